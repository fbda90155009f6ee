"""The engine: one thread that admits requests, runs packed steps and tells each request what happened.

Owns the life of a request between `submit` and its last event. Public methods run on the event loop and
only put things into the inbox; everything else runs on the engine thread. Knows nothing of HTTP or text.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from bisect import bisect_right
from collections import deque
from dataclasses import replace

from torch import Tensor

from server.engine.config import EngineConfig
from server.engine.events import Done, Event, Failure, Finish, FinishReason, Progress, Token, Usage
from server.engine.model_runner import ModelRunner, StepResult, Work
from server.engine.progress import PrefillProgress
from server.engine.recorder import Recorder, RequestTimes
from server.engine.request import Request
from server.engine.sampler import make_state, sample
from server.engine.scheduler import Chunk, Limits, Scheduler
from server.engine.sequence import RequestState, Sequence
from server.engine.stream import RequestStream
from server.errors import (
    ContextLengthError,
    InvalidRequestError,
    MemoryExhaustedError,
    RateLimitError,
    ServerError,
    UnavailableError,
)
from server.sessions.manager import SessionManager

logger = logging.getLogger(__name__)


class Engine:
    """Runs one model. `start` once, `submit` many times, `stop` once."""

    def __init__(self, config: EngineConfig, runner: ModelRunner, manager: SessionManager, recorder: Recorder) -> None:
        self.config = config
        self.model_name = config.model
        self.max_model_len = config.max_model_len or runner.max_position
        self._runner, self._manager, self._recorder = runner, manager, recorder
        limits = Limits(config.max_num_seqs, config.max_num_batched_tokens, config.step_time_budget_ms / 1000)
        self._scheduler = Scheduler(limits, self._admit)
        self._progress = PrefillProgress()
        self._seeds = random.Random(config.seed)
        self._wake = threading.Condition()
        self._inbox: deque[Sequence | str] = deque()  # new first choices, and ids to abort; guarded by _wake
        self._streams: dict[str, RequestStream] = {}  # guarded by _wake; an id leaves with its last event
        self._queued: dict[str, int] = {}  # id -> prompt tokens of requests not started; guarded by _wake
        self._by_request: dict[str, list[Sequence]] = {}  # engine thread only
        self._outbox: dict[str, list[Event]] = {}  # engine thread only, delivered after each step
        self._is_stopping = False
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._failure: BaseException | None = None

    # --- event loop -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine thread."""
        self._report_memory()
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
            stream = RequestStream(request.request_id, self._request_abort)
            self._streams[request.request_id] = stream
            self._queued[request.request_id] = len(request.prompt_token_ids)
            state = RequestState(request, time.monotonic(), num_unfinished=request.sampling.n)
            self._inbox.append(Sequence(state, 0, list(request.prompt_token_ids)))
            self._wake.notify()
        return stream

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
        room = self.max_model_len - num_prompt
        if room < 1 or (params.max_tokens is not None and params.max_tokens > room):
            asked = f" and {params.max_tokens} tokens of answer were asked for" if params.max_tokens else ""
            raise ContextLengthError(
                f"This model's maximum context length is {self.max_model_len} tokens; "
                f"the prompt has {num_prompt}{asked}.",
                param="messages",
            )
        request = replace(request, max_new_tokens=params.max_tokens or room)
        return self._fitted(request)

    def _fitted(self, request: Request) -> Request:
        """Refuse a request that not even an empty server could hold; an open-ended answer is cut to what fits."""
        limit = self._manager.budget.limit_bytes
        needed = self._worst_case_bytes(request, 0)
        if needed <= limit:
            return request
        longest = bisect_right(
            range(1, request.max_new_tokens + 1),
            limit,
            key=lambda n: self._worst_case_bytes(replace(request, max_new_tokens=n), 0),
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

    def _request_abort(self, request_id: str) -> None:
        with self._wake:
            if request_id in self._streams:
                self._inbox.append(request_id)
                self._wake.notify()

    # --- engine thread --------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            while self._failure is None:
                self._take_inbox()
                if self._failure is None:
                    self._step()
        except BaseException as error:
            self._failure = error
            logger.exception("the engine has stopped")
        finally:
            self._fail_everything()

    def _take_inbox(self) -> None:
        """Accept new sequences and aborts; sleep while there is nothing to do."""
        with self._wake:
            while not self._inbox and not self._scheduler.has_work and self._failure is None:
                self._wake.wait()
            taken, self._inbox = list(self._inbox), deque()
        for item in taken:
            if isinstance(item, Sequence):
                self._by_request[item.request.request_id] = [item]
                self._scheduler.add(item)
            else:
                self._abort(item)
        self._deliver()

    def _step(self) -> None:
        """Schedule, run, post-process. A failure ends only the requests that cannot run alone."""
        started = time.perf_counter()
        chunks, preempted = self._scheduler.schedule()
        for _ in preempted:
            self._recorder.preemption()
        if chunks:
            positions = [c.sequence.num_computed for c in chunks]
            if self._run_chunks(chunks):
                seconds = time.perf_counter() - started
                self._scheduler.cost.observe(seconds, chunks, positions)
                num_decodes = sum(c.is_decode for c in chunks)
                self._recorder.step(seconds, num_decodes, sum(c.num_tokens for c in chunks) - num_decodes)
        elif self._scheduler.waiting:
            self._fail_stuck()
        self._report()
        self._deliver()

    def _fail_stuck(self) -> None:
        """Nothing runs and the head of the queue still is not admitted: it waits for builds, or never fits."""
        if any(s.index_state == "building" for s in self._manager.store):
            time.sleep(0.005)
            return
        sequence = self._scheduler.waiting[0]
        stats = self._manager.stats()
        self._fail_request(
            sequence.state,
            MemoryExhaustedError(
                f"KV memory is exhausted: {stats.kv_bytes + stats.index_bytes} bytes held and "
                f"{stats.reserved_bytes} reserved of {stats.limit_bytes}"
            ),
        )

    def _admit(self, sequence: Sequence) -> bool:
        """Open the context and reserve its worst case; a preempted sequence still has both."""
        if sequence.context is not None:
            return True
        state, request = sequence.state, sequence.request
        total = len(request.prompt_token_ids) + request.max_new_tokens
        context = self._manager.open(sequence.token_ids, request.cache_salt, total)
        needed = self._worst_case_bytes(request, context.tail_start)
        if not self._manager.reserve(needed):
            self._manager.drop(context)
            return False
        sequence.context, sequence.num_computed = context, context.num_tokens
        state.num_reserved_bytes, state.num_cached_tokens = needed, context.num_tokens
        state.started = time.monotonic()
        with self._wake:
            self._queued.pop(request.request_id, None)
        self._prepare_sampling(sequence)
        return True

    def _worst_case_bytes(self, request: Request, num_shared: int) -> int:
        """The first choice's whole context, and the generated part of the others."""
        first = len(request.prompt_token_ids) - num_shared + request.max_new_tokens
        others = (request.sampling.n - 1) * (request.max_new_tokens + self._manager.max_copied_tokens)
        return self._manager.worst_case_bytes(first) + self._manager.worst_case_bytes(others)

    def _prepare_sampling(self, sequence: Sequence) -> None:
        params = sequence.request.sampling
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(62)
        sequence.sampler_state = make_state(
            params, sequence.request.prompt_token_ids, sequence.choice, seed, self._runner.vocab_size
        )
        eos = frozenset[int]() if params.ignore_eos else self._runner.end_ids
        sequence.stop_ids = eos | frozenset(params.stop_token_ids)

    def _run_chunks(self, chunks: list[Chunk]) -> bool:
        """Run them together; when that fails, each alone, so that one bad request takes no other with it."""
        try:
            result = self._runner.run([_work(chunk) for chunk in chunks])
        except Exception as error:
            if len(chunks) == 1:
                logger.exception("request %s failed", chunks[0].sequence.request.request_id)
                self._fail_request(chunks[0].sequence.state, _as_server_error(error))
                return False
            logger.warning("a step of %d sequences failed (%s); running them one by one", len(chunks), error)
            ran = [self._run_chunks([chunk]) for chunk in chunks]  # all of them, whatever the first ones say
            return any(ran)
        self._record_attention(chunks, result)
        self._finish_chunks(chunks, result)
        return True

    def _record_attention(self, chunks: list[Chunk], result: StepResult) -> None:
        num_decodes = sum(c.is_decode for c in chunks)
        if not num_decodes:
            return
        seconds = result.decode_attention_seconds / self._runner.geometry.num_layers
        self._recorder.attention(seconds, result.num_visible, result.num_scored, result.num_retrieved)
        for chunk in chunks:
            if chunk.is_decode:
                chunk.sequence.state.num_visible += result.num_visible // num_decodes
                chunk.sequence.state.num_scored += result.num_scored // num_decodes

    def _finish_chunks(self, chunks: list[Chunk], result: StepResult) -> None:
        rows = iter(result.logits)
        for chunk in chunks:
            sequence = chunk.sequence
            is_last = chunk.num_tokens == sequence.num_remaining
            sequence.num_computed += chunk.num_tokens
            logits = next(rows) if is_last else None
            if sequence.status == "finished":
                continue  # a sibling's failure has ended the request within this step
            if not chunk.is_decode:
                self._prefilled(sequence)
            try:
                for choice in self._forked(sequence) if logits is not None else []:
                    assert logits is not None
                    self._sample(choice, logits)
            except Exception as error:
                logger.exception("sampling for request %s failed", sequence.request.request_id)
                self._fail_request(sequence.state, _as_server_error(error))

    def _prefilled(self, sequence: Sequence) -> None:
        """A prefill chunk was computed: report it and, at the prompt's end, seal."""
        done, total = sequence.num_computed, len(sequence.token_ids)
        self._emit(sequence, Progress(done, total))
        self._progress.show(sequence.request.request_id, done, total)
        if sequence.num_remaining == 0:
            self._runner.prefill_done(sequence.context)
            self._sealed(sequence, self._manager.prompt_done(sequence.context, sequence.token_ids))
            self._recorder.prompt(sequence.num_prompt_tokens, sequence.state.num_cached_tokens)

    def _sealed(self, sequence: Sequence, num_tokens: int) -> None:
        """Tokens that a segment holds now are no longer reserved."""
        if num_tokens:
            moved = min(self._manager.worst_case_bytes(num_tokens), sequence.state.num_reserved_bytes)
            sequence.state.num_reserved_bytes -= moved
            self._manager.release(moved)

    def _forked(self, sequence: Sequence) -> list[Sequence]:
        """The sequence itself and, right after the prompt, its sibling choices."""
        n = sequence.request.sampling.n
        siblings = self._by_request[sequence.request.request_id]
        if n == 1 or len(siblings) == n:
            return [sequence]
        for choice in range(1, n):
            twin = Sequence(sequence.state, choice, list(sequence.token_ids), num_computed=sequence.num_computed)
            twin.context = sequence.context.fork()
            params = sequence.request.sampling
            seed = params.seed if params.seed is not None else self._seeds.getrandbits(62)
            prompt = sequence.request.prompt_token_ids
            twin.sampler_state = make_state(params, prompt, choice, seed, self._runner.vocab_size)
            twin.stop_ids = sequence.stop_ids
            siblings.append(twin)
            self._scheduler.add_running(twin)
        return list(siblings)

    def _sample(self, sequence: Sequence, logits: Tensor) -> None:
        """Choose the next token, tell the request, and end the choice when it is over."""
        state, params = sequence.state, sequence.request.sampling
        chosen = sample(logits, params, sequence.sampler_state, sequence.num_generated, sequence.stop_ids)
        now = time.monotonic()
        if state.first_token is None:
            state.first_token = now
            self._recorder.first_token(now - state.arrival)
        if sequence.last_token_time is not None:
            self._recorder.inter_token(now - sequence.last_token_time)
        sequence.last_token_time = now
        sequence.token_ids.append(chosen.token_id)
        state.num_generated += 1
        self._emit(sequence, Token(sequence.choice, chosen.token_id, chosen.logprob, chosen.top_logprobs))
        if chosen.token_id in sequence.stop_ids:
            self._finish(sequence, "stop", chosen.token_id)
        elif sequence.num_generated >= sequence.request.max_new_tokens:
            self._finish(sequence, "length", None)
        else:
            self._sealed(sequence, self._manager.grown(sequence.context, sequence.token_ids))

    # --- ends -----------------------------------------------------------------------------------------

    def _finish(self, sequence: Sequence, reason: FinishReason, stop_token_id: int | None) -> None:
        """One choice is over; the last one ends the request."""
        state = sequence.state
        self._scheduler.remove(sequence)
        self._manager.close(sequence.context, sequence.token_ids)
        self._emit(sequence, Finish(sequence.choice, reason, stop_token_id))
        state.num_unfinished -= 1
        if state.num_unfinished == 0:
            share = state.num_scored / state.num_visible if state.num_visible else None
            usage = Usage(sequence.num_prompt_tokens, state.num_cached_tokens, state.num_generated, share)
            self._end(state, reason, Done(usage))

    def _abort(self, request_id: str) -> None:
        """The client went away: what was computed stays cached, everything else is freed."""
        sequences = self._by_request.get(request_id)
        if sequences is None:
            return
        for sequence in sequences:
            if sequence.status != "finished":
                self._scheduler.remove(sequence)
                if sequence.context is not None:
                    self._manager.close(sequence.context, sequence.token_ids)
                self._emit(sequence, Finish(sequence.choice, "abort"))
        state = sequences[0].state
        usage = Usage(sequences[0].num_prompt_tokens, state.num_cached_tokens, state.num_generated, None)
        self._end(state, "abort", Done(usage))

    def _fail_request(self, state: RequestState, error: ServerError) -> None:
        """End all choices of one request in an error; nothing of it is kept."""
        for sequence in self._by_request.get(state.request.request_id, []):
            if sequence.status != "finished":
                self._scheduler.remove(sequence)
                if sequence.context is not None:
                    self._manager.drop(sequence.context)
        self._end(state, "error", Failure(error))

    def _end(self, state: RequestState, reason: str, last: Event) -> None:
        """Send the last event, give the reservation back, record the times."""
        request_id = state.request.request_id
        if self._by_request.pop(request_id, None) is None:
            return
        self._manager.release(state.num_reserved_bytes)
        state.num_reserved_bytes = 0
        self._outbox.setdefault(request_id, []).append(last)
        self._recorder.ended(reason, state.num_generated, _times(state, time.monotonic()))

    def _fail_everything(self) -> None:
        """The thread ends: every request still open is told why."""
        error = _as_server_error(self._failure) if self._failure else UnavailableError("the engine has stopped")
        with self._wake:
            late = [item for item in self._inbox if isinstance(item, Sequence)]
            self._inbox.clear()
        for sequence in late:
            self._by_request[sequence.request.request_id] = [sequence]
        for sequences in list(self._by_request.values()):
            self._fail_request(sequences[0].state, error)
        self._report()
        self._deliver()

    # --- reports --------------------------------------------------------------------------------------

    def _emit(self, sequence: Sequence, event: Event) -> None:
        self._outbox.setdefault(sequence.request.request_id, []).append(event)

    def _deliver(self) -> None:
        """Hand the collected events over, one wake-up per request."""
        outbox, self._outbox = self._outbox, {}
        for request_id, events in outbox.items():
            is_over = isinstance(events[-1], Done | Failure)
            with self._wake:
                stream = self._streams.pop(request_id, None) if is_over else self._streams.get(request_id)
                if is_over:
                    self._queued.pop(request_id, None)
            if stream is not None:
                stream.push(events)

    def _report(self) -> None:
        waiting = self._scheduler.waiting
        self._recorder.running(
            len(self._scheduler.running), len(waiting), sum(s.num_remaining for s in waiting if s.context is None)
        )
        prefills = [s for s in self._scheduler.running if s.is_prefilling]
        self._recorder.prefill_progress(sum(s.num_computed for s in prefills), sum(len(s.token_ids) for s in prefills))
        self._report_memory()

    def _report_memory(self) -> None:
        stats = self._manager.stats()
        tails = sum(s.context.tail_bytes for s in self._scheduler.running if s.context is not None)
        self._recorder.memory("host", "kv", stats.kv_bytes + tails)
        self._recorder.memory("host", "index", stats.index_bytes)
        self._recorder.segments("host", stats.num_segments)


def _work(chunk: Chunk) -> Work:
    sequence = chunk.sequence
    tokens = sequence.token_ids[sequence.num_computed : sequence.num_computed + chunk.num_tokens]
    return Work(sequence.context, tokens, chunk.is_decode, chunk.num_tokens == sequence.num_remaining)


def _times(state: RequestState, now: float) -> RequestTimes:
    started, first = state.started, state.first_token
    return RequestTimes(
        queue_seconds=None if started is None else started - state.arrival,
        prefill_seconds=None if started is None or first is None else first - started,
        decode_seconds=None if first is None else now - first,
        e2e_seconds=now - state.arrival,
    )


def _as_server_error(error: BaseException) -> ServerError:
    """What the client is told: no internals, except for errors made for callers and memory."""
    if isinstance(error, ServerError):
        return error
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return MemoryExhaustedError("memory ran out while this request was computed")
    return ServerError("the request failed inside the engine; the server's log holds the reason")
