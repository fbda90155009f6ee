"""The engine: accepts requests on the event loop and runs a worker on a thread of its own.

Owns the inbox, the streams and the thread; refuses what can never run before any work. Public methods run on
the event loop and only put things into the inbox. Knows nothing of HTTP or text.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from server.engine.config import EngineConfig
from server.engine.events import Done, Failure
from server.engine.model_runner import ModelRunner
from server.engine.recorder import Recorder
from server.engine.request import Request
from server.engine.sequence import RequestState, Sequence
from server.engine.sessions import EngineSessions
from server.engine.stream import Batch, RequestStream, deliver
from server.engine.warm_up import warm_up
from server.engine.worker import Worker
from server.errors import (
    ContextLengthError,
    InvalidRequestError,
    MemoryExhaustedError,
    RateLimitError,
    UnavailableError,
)
from server.sessions.manager import SessionManager
from server.sessions.registry import SessionRegistry

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EndOrder:
    """One choice is complete, or (choice None) the whole request is given up."""

    request_id: str
    choice: int | None


@dataclass(frozen=True, slots=True)
class Task:
    """Something short to do on the engine thread, and who waits for it."""

    work: Callable[[], Any]
    future: Future[Any]

    def run(self) -> None:
        """Never raises: whoever waits is told."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.work())
        except Exception as error:
            self.future.set_exception(error)


class Engine:
    """Runs one model. `start` once, `submit` many times, `stop` once."""

    def __init__(
        self,
        config: EngineConfig,
        runner: ModelRunner,
        manager: SessionManager,
        sessions: SessionRegistry,
        recorder: Recorder,
    ) -> None:
        self.config = config
        self.model_name = config.model
        self.max_model_len = config.max_model_len or runner.max_position
        self._runner, self._manager = runner, manager
        self._worker = Worker(config, runner, manager, sessions, recorder, self._started)
        self.sessions = EngineSessions(self.between_steps, sessions)
        self._wake = threading.Condition()
        self._inbox: deque[Sequence | EndOrder | Task] = deque()  # new first choices, and what to end; guarded by _wake
        self._streams: dict[str, RequestStream] = {}  # guarded by _wake; an id leaves with its last event
        self._queued: dict[str, int] = {}  # id -> prompt tokens of requests not started; guarded by _wake
        self._is_stopping = False
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._failure: BaseException | None = None

    # --- event loop -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine thread."""
        self._worker.report()
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """False before `start`, after `stop` and when the thread has died."""
        return self._thread.is_alive()

    def submit(self, request: Request) -> RequestStream:
        """Queue a request. Raises the `ServerError` that refuses it before any work."""
        request = self._checked(request)
        with self._wake:
            if self._is_stopping:
                raise UnavailableError("the server is shutting down", code="shutting_down")
            if not self.is_alive:
                raise UnavailableError("the engine has stopped after a failure", code="engine_dead")
            self._check_queue(request)
            if request.request_id in self._streams:
                raise InvalidRequestError(f"request id {request.request_id!r} is in use", param="request_id")
            stream = RequestStream(request.request_id, self._request_end)
            self._streams[request.request_id] = stream
            self._queued[request.request_id] = len(request.prompt_token_ids)
            state = RequestState(request, time.monotonic(), num_unfinished=request.sampling.n)
            self._inbox.append(Sequence(state, 0, list(request.prompt_token_ids)))
            self._wake.notify()
        return stream

    async def warm_up(self) -> int:
        """Run every kind of step once, on the thread that runs them: some caches are a thread's own.

        Returns bytes: the working memory of a full step.
        """
        self._worker.step_bytes = await self.between_steps(lambda: warm_up(self.config, self._runner, self._manager))
        return self._worker.step_bytes

    def count_from(self, base_bytes: int) -> None:
        """From now on, what is resident above `base_bytes` and nobody accounts for makes idle segments go earlier."""
        self._worker.base_bytes = base_bytes

    async def between_steps(self, work: Callable[[], Any]) -> Any:
        """Run `work` on the engine thread between two steps; returns or raises what it does."""
        task = Task(work, Future())
        with self._wake:
            if not self.is_alive or self._failure is not None:
                raise UnavailableError("the engine has stopped", code="engine_dead")
            self._inbox.append(task)
            self._wake.notify()
        return await asyncio.wrap_future(task.future)

    async def stop(self, drain_seconds: float) -> None:
        """Refuse new requests, let the running ones finish for `drain_seconds`, fail the rest, end the thread."""
        with self._wake:
            self._is_stopping = True
        deadline = time.monotonic() + drain_seconds
        while self.is_alive and self._streams and time.monotonic() < deadline:  # noqa: ASYNC110 - ends on a thread
            await asyncio.sleep(0.02)
        with self._wake:
            self._failure = self._failure or UnavailableError("the server is shutting down", code="shutting_down")
            self._wake.notify()
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self._manager.shutdown)
        await asyncio.to_thread(self._runner.close)

    def _checked(self, request: Request) -> Request:
        """Refuse what can never run; resolve how many tokens may be generated."""
        num_prompt, params = len(request.prompt_token_ids), request.sampling
        if num_prompt == 0:
            raise InvalidRequestError("the prompt is empty", param="prompt")
        worst = max(request.prompt_token_ids)
        if worst >= self._runner.vocab_size or min(request.prompt_token_ids) < 0:
            raise InvalidRequestError(f"token id {worst} is outside the vocabulary", param="prompt")
        if params.n > self.config.max_num_seqs:
            raise InvalidRequestError(
                f"n is {params.n}, more than --max-num-seqs {self.config.max_num_seqs}", param="n"
            )
        for name, ids in (("logit_bias", [i for i, _ in params.logit_bias]), ("stop_token_ids", params.stop_token_ids)):
            if any(not 0 <= token_id < self._runner.vocab_size for token_id in ids):
                raise InvalidRequestError(f"{name} names a token outside the vocabulary", param=name)
        room = self.max_model_len - num_prompt
        if room < (0 if params.max_tokens == 0 else 1) or (params.max_tokens is not None and params.max_tokens > room):
            asked = f" and {params.max_tokens} tokens of answer were asked for" if params.max_tokens else ""
            raise ContextLengthError(
                f"This model's maximum context length is {self.max_model_len} tokens; "
                f"the prompt has {num_prompt}{asked}.",
                param="messages",
            )
        request = replace(request, max_new_tokens=room if params.max_tokens is None else params.max_tokens)
        return self._fitted(request)

    def _fitted(self, request: Request) -> Request:
        """Refuse a request that not even an empty server could hold; an open-ended answer is cut to what fits."""
        limit = self._manager.budget.limit_bytes
        needed = self._worker.worst_case_bytes(request, 0)
        if self._manager.budget.fits_ever(needed):
            return request
        longest = bisect_right(
            range(1, request.max_new_tokens + 1),
            limit,
            key=lambda n: self._worker.worst_case_bytes(replace(request, max_new_tokens=n), 0),
        )
        if request.sampling.max_tokens is None and longest:
            return replace(request, max_new_tokens=longest)
        raise MemoryExhaustedError(
            f"the request may need {needed} bytes of KV memory, the budget (--kv-host-memory) is {limit} bytes"
        )

    def _check_queue(self, request: Request) -> None:
        num_waiting, num_tokens = len(self._queued), sum(self._queued.values())
        if num_waiting >= self.config.max_queue_len:
            raise RateLimitError(f"{num_waiting} requests are waiting, the most allowed", retry_after_seconds=1)
        limit = self.config.max_queued_tokens
        if limit is not None and num_waiting and num_tokens + len(request.prompt_token_ids) > limit:
            raise RateLimitError(f"{num_tokens} prompt tokens are waiting, {limit} allowed", retry_after_seconds=1)

    def _request_end(self, request_id: str, choice: int | None) -> None:
        with self._wake:
            if request_id in self._streams:
                self._inbox.append(EndOrder(request_id, choice))
                self._wake.notify()

    # --- engine thread --------------------------------------------------------------------------------

    def _started(self, request_id: str) -> None:
        with self._wake:
            self._queued.pop(request_id, None)

    def _main(self) -> None:
        try:
            while self._failure is None:
                self._take_inbox()
                if self._failure is None:
                    self._worker.step()
                    self._deliver()
        except BaseException as error:
            self._failure = error
            logger.exception("the engine has stopped")
        finally:
            self._take_inbox()
            self._worker.fail_everything(self._failure or UnavailableError("the engine has stopped"))
            self._deliver()

    def _take_inbox(self) -> None:
        """Accept new sequences and aborts; sleep while there is nothing to do."""
        with self._wake:
            while not self._inbox and not self._worker.has_work and self._failure is None:
                if not self._wake.wait(self._worker.idle_seconds()):
                    self._worker.report()
            taken, self._inbox = list(self._inbox), deque()
        for item in taken:
            if isinstance(item, Sequence):
                self._worker.add(item)
            elif isinstance(item, Task):
                item.run()
            elif item.choice is None:
                self._worker.abort(item.request_id)
            else:
                self._worker.stop(item.request_id, item.choice)
        self._deliver()

    def _deliver(self) -> None:
        """Hand the collected events over, all with one wake-up."""
        taken = self._worker.take_events()
        if not taken:
            return
        batches: list[Batch] = []
        with self._wake:
            for request_id, events in taken.items():
                is_over = isinstance(events[-1], Done | Failure)
                stream = self._streams.pop(request_id, None) if is_over else self._streams.get(request_id)
                if is_over:
                    self._queued.pop(request_id, None)
                if stream is not None:
                    batches.append((stream, events))
        deliver(batches)
