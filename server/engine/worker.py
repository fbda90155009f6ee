"""The worker: what the engine thread does with admitted requests, step by step.

Owns the scheduler and the sequences of every open request, and collects the events they cause. Runs on the
engine thread only and never waits for new work; the engine hands that over between steps. Knows nothing of
HTTP, text, streams or locks.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable

from torch import Tensor

from server.engine.config import EngineConfig
from server.engine.events import Done, Event, Failure, Finish, FinishReason, Progress, Token, Usage
from server.engine.model_runner import ModelRunner, StepResult, Work
from server.engine.progress import PrefillProgress
from server.engine.recorder import Recorder, RequestTimes
from server.engine.request import Request
from server.engine.sampler import Row, Sampled, make_state, sample_rows, score_prompt
from server.engine.scheduler import Chunk, Limits, Scheduler
from server.engine.sequence import RequestState, Sequence
from server.errors import MemoryExhaustedError, ServerError
from server.memory import resident_bytes
from server.sessions.manager import SessionManager
from server.sessions.registry import SessionRegistry

logger = logging.getLogger(__name__)

REPORT_SECONDS = 0.1  # gauges are read every few seconds; counting what is held takes longer the more is held


class Worker:
    """Runs steps over open requests; `take_events` empties what they have caused since the last call."""

    def __init__(
        self,
        config: EngineConfig,
        runner: ModelRunner,
        manager: SessionManager,
        sessions: SessionRegistry,
        recorder: Recorder,
        on_started: Callable[[str], None],
    ) -> None:
        self.manager, self.runner, self.sessions = manager, runner, sessions
        self._recorder, self._on_started = recorder, on_started
        limits = Limits(config.max_num_seqs, config.max_num_batched_tokens, config.step_time_budget_ms / 1000)
        self.scheduler = Scheduler(limits, self._admit)
        self._progress = PrefillProgress()
        self.base_bytes = 0  # resident before anything is held; set by the engine as well
        self.step_bytes = 0  # working memory of a full prefill step; set by the engine when it is warmed up
        self._seeds = random.Random(config.seed)
        self._by_request: dict[str, list[Sequence]] = {}  # open requests' choices
        self._events: dict[str, list[Event]] = {}
        self._last_report = 0.0

    @property
    def has_work(self) -> bool:
        """Anything waiting or running."""
        return self.scheduler.has_work

    def add(self, sequence: Sequence) -> None:
        """Queue a request by its first choice."""
        self._by_request[sequence.request.request_id] = [sequence]
        self.sessions.queued(sequence.request)
        self.scheduler.add(sequence)

    def take_events(self) -> dict[str, list[Event]]:
        """Events by request since the last call, in order."""
        events, self._events = self._events, {}
        return events

    def step(self) -> None:
        """Schedule, run, post-process. A failure ends only the requests that cannot run alone."""
        started = time.perf_counter()
        if self.scheduler.waiting:
            self.manager.settle()  # what the first of them waits for may have come from disk, or gone there
        chunks, preempted = self.scheduler.schedule()
        for _ in preempted:
            self._recorder.preemption()
        if chunks:
            positions = [c.sequence.num_computed for c in chunks]
            if self._run_chunks(chunks):
                seconds = time.perf_counter() - started
                self.scheduler.cost.observe(seconds, chunks, positions)
                num_decodes = sum(c.is_decode for c in chunks)
                self._recorder.step(seconds, num_decodes, sum(c.num_tokens for c in chunks) - num_decodes)
        elif self.scheduler.waiting:
            self._fail_stuck()
        if not self.has_work or started - self._last_report >= REPORT_SECONDS:
            self.report()

    def _fail_stuck(self) -> None:
        """Nothing runs and the head of the queue still is not admitted: it waits for threads, or never fits."""
        if self.manager.num_pending:
            time.sleep(0.002)
            return
        sequence = self.scheduler.waiting[0]
        stats = self.manager.stats()
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
        if sequence.refused_at == self.manager.num_changes:
            return False  # nothing was freed since the last try
        state, request = sequence.state, sequence.request
        total = len(request.prompt_token_ids) + request.max_new_tokens
        is_scored = request.sampling.num_prompt_logprobs is not None  # K and V alone tell no logits
        if not is_scored and not self.manager.prepare(sequence.token_ids, request.cache_salt):
            sequence.refused_at = self.manager.num_changes
            return False
        context = self.manager.open(sequence.token_ids, request.cache_salt, total, reuse=not is_scored)
        needed = self.worst_case_bytes(request, context.tail_start)
        if not self.manager.reserve(needed):
            self.manager.drop(context)
            sequence.refused_at = self.manager.num_changes
            return False
        sequence.context, sequence.num_computed = context, context.num_tokens
        self.sessions.opened(request, context)
        state.num_reserved_bytes, state.num_cached_tokens = needed, context.num_tokens
        state.started = time.monotonic()
        self._on_started(request.request_id)
        self._prepare_sampling(sequence)
        return True

    def worst_case_bytes(self, request: Request, num_shared: int) -> int:
        """The first choice's whole context, and the generated part of the others."""
        num_new = request.max_new_tokens
        first = self.manager.worst_case_bytes(len(request.prompt_token_ids) - num_shared + num_new, num_new)
        num_own = self.manager.max_copied_tokens + num_new
        return first + (request.sampling.n - 1) * self.manager.worst_case_bytes(num_own, num_own)

    def _prepare_sampling(self, sequence: Sequence) -> None:
        request = sequence.request
        seed = request.sampling.seed if request.sampling.seed is not None else self._seeds.getrandbits(62)
        constraint = request.make_constraint() if request.make_constraint else None
        sequence.sampler_state = make_state(
            request.sampling, request.prompt_token_ids, sequence.choice, seed, self.runner.vocab_size, constraint
        )
        goes_on = request.sampling.ignore_eos and constraint is None  # nothing may follow the end of a grammar
        eos = frozenset[int]() if goes_on else self.runner.end_ids
        sequence.stop_ids = eos | frozenset(request.sampling.stop_token_ids)

    def _run_chunks(self, chunks: list[Chunk]) -> bool:
        """Run them together; when that fails, each alone, so that one bad request takes no other with it."""
        try:
            result = self.runner.run([_work(chunk) for chunk in chunks])
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
        seconds = result.decode_attention_seconds / self.runner.geometry.num_layers
        self._recorder.attention(seconds, result.num_visible, result.num_scored, result.num_retrieved)
        for chunk in chunks:
            if chunk.is_decode:
                chunk.sequence.state.num_visible += result.num_visible // num_decodes
                chunk.sequence.state.num_scored += result.num_scored // num_decodes

    def _finish_chunks(self, chunks: list[Chunk], result: StepResult) -> None:
        ready: list[tuple[Sequence, Tensor]] = []
        begin = end = 0  # of the chunk's logits
        for chunk in chunks:
            sequence, begin = chunk.sequence, end
            end += _num_logits(chunk)
            is_last = chunk.num_tokens == sequence.num_remaining
            sequence.num_computed += chunk.num_tokens
            if sequence.status == "finished":
                continue  # a sibling's failure has ended the request within this step
            try:
                if not chunk.is_decode:
                    self._prefilled(sequence)
                    self._score_prompt(sequence, result.logits[begin:end])
                if is_last:
                    last = result.logits[end - 1]
                    ready += [(choice, last) for choice in self._forked(sequence)]
            except Exception as error:
                self._fail_sampling(sequence, error)
        self._sample(ready)

    def _sample(self, ready: list[tuple[Sequence, Tensor]]) -> None:
        """Choose the next token of every sequence that has logits and is still open."""
        ready = [(s, logits) for s, logits in ready if s.status != "finished"]
        rows = [Row(row, s.request.sampling, s.sampler_state, s.num_generated, s.stop_ids) for s, row in ready]
        for (sequence, _), chosen in zip(ready, sample_rows(rows), strict=True):
            if sequence.status == "finished":
                continue  # a sibling's failure has just ended the request
            try:
                if isinstance(chosen, Exception):
                    raise chosen
                self._sampled(sequence, chosen)
            except Exception as error:
                self._fail_sampling(sequence, error)

    def _fail_sampling(self, sequence: Sequence, error: Exception) -> None:
        logger.error("sampling for request %s failed", sequence.request.request_id, exc_info=error)
        self._fail_request(sequence.state, _as_server_error(error))

    def _prefilled(self, sequence: Sequence) -> None:
        """A prefill chunk was computed: report it and, at the prompt's end, seal."""
        done, total = sequence.num_computed, len(sequence.token_ids)
        self._emit(sequence, Progress(done, total))
        self._progress.show(sequence.request.request_id, done, total)
        if sequence.num_remaining == 0:
            self.runner.prefill_done(sequence.context)
            self._sealed(sequence, self.manager.prompt_done(sequence.context, sequence.token_ids))
            self._recorder.prompt(sequence.num_prompt_tokens, sequence.state.num_cached_tokens)

    def _score_prompt(self, sequence: Sequence, logits: Tensor) -> None:
        """Log-probabilities of the tokens that follow the chunk's rows; the last row of a prompt has none."""
        num_top = sequence.request.sampling.num_prompt_logprobs
        if num_top is None:
            return
        start = sequence.num_computed - len(logits) + 1
        follow = sequence.token_ids[start : sequence.num_computed + 1]
        if follow:
            self._emit(sequence, score_prompt(logits[: len(follow)], start, follow, num_top))

    def _sealed(self, sequence: Sequence, num_tokens: int) -> None:
        """K and V that a segment holds now are no longer reserved; what its index may need still is."""
        if num_tokens:
            moved = min(self.manager.kv_bytes(num_tokens), sequence.state.num_reserved_bytes)
            sequence.state.num_reserved_bytes -= moved
            self.manager.release(moved)

    def _forked(self, sequence: Sequence) -> list[Sequence]:
        """The sequence itself and, right after the prompt, its sibling choices."""
        n = sequence.request.sampling.n
        siblings = self._by_request[sequence.request.request_id]
        if n == 1 or len(siblings) == n:
            return [sequence]
        for choice in range(1, n):
            twin = Sequence(sequence.state, choice, list(sequence.token_ids), num_computed=sequence.num_computed)
            twin.context = sequence.context.fork()
            self.sessions.opened(sequence.request, twin.context)
            self._prepare_sampling(twin)
            siblings.append(twin)
            self.scheduler.add_running(twin)
        return list(siblings)

    def _sampled(self, sequence: Sequence, chosen: Sampled) -> None:
        """The next token is known: tell the request, and end the choice when it is over."""
        state = sequence.state
        if sequence.request.max_new_tokens == 0:  # the prompt was to be read, and nothing else
            self._finish(sequence, "length", None)
            return
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
            self._sealed(sequence, self.manager.grown(sequence.context, sequence.token_ids))

    # --- ends -----------------------------------------------------------------------------------------

    def _finish(self, sequence: Sequence, reason: FinishReason, stop_token_id: int | None) -> None:
        """One choice is over; the last one ends the request."""
        state = sequence.state
        self.scheduler.remove(sequence)
        self._close(sequence)
        self._emit(sequence, Finish(sequence.choice, reason, stop_token_id))
        state.num_unfinished -= 1
        if state.num_unfinished == 0:
            share = state.num_scored / state.num_visible if state.num_visible else None
            usage = Usage(sequence.num_prompt_tokens, state.num_cached_tokens, state.num_generated, share)
            self._end(state, reason, Done(usage))

    def stop(self, request_id: str, choice: int) -> None:
        """One choice is complete, as its reader has found; nothing to do where it has ended meanwhile."""
        for sequence in self._by_request.get(request_id, []):
            if sequence.choice == choice and sequence.status != "finished" and sequence.num_generated > 0:
                self._finish(sequence, "stop", None)
                return

    def abort(self, request_id: str) -> None:
        """The client went away: what was computed stays cached, everything else is freed."""
        sequences = self._by_request.get(request_id)
        if sequences is None:
            return
        for sequence in sequences:
            if sequence.status != "finished":
                self.scheduler.remove(sequence)
                if sequence.context is not None:
                    self._close(sequence)
                self._emit(sequence, Finish(sequence.choice, "abort"))
        state = sequences[0].state
        usage = Usage(sequences[0].num_prompt_tokens, state.num_cached_tokens, state.num_generated, None)
        self._end(state, "abort", Done(usage))

    def _close(self, sequence: Sequence) -> None:
        """Its context ends; what was computed stays cached, as the context of its session."""
        self.sessions.closing(sequence.request, sequence.context, sequence.token_ids)
        self.manager.close(sequence.context, sequence.token_ids)

    def _fail_request(self, state: RequestState, error: ServerError) -> None:
        """End all choices of one request in an error; nothing of it is kept."""
        for sequence in self._by_request.get(state.request.request_id, []):
            if sequence.status != "finished":
                self.scheduler.remove(sequence)
                if sequence.context is not None:
                    self.manager.drop(sequence.context)
        self._end(state, "error", Failure(error))

    def _end(self, state: RequestState, reason: str, last: Event) -> None:
        """Send the last event, give the reservation back, record the times."""
        request_id = state.request.request_id
        if self._by_request.pop(request_id, None) is None:
            return
        self.manager.release(state.num_reserved_bytes)
        state.num_reserved_bytes = 0
        self.sessions.ended(state.request, last.error.message if isinstance(last, Failure) else None)
        self._events.setdefault(request_id, []).append(last)
        self._recorder.ended(reason, state.num_generated, _times(state, time.monotonic()))

    def fail_everything(self, error: BaseException) -> None:
        """The thread ends: every request still open is told why."""
        for sequences in list(self._by_request.values()):
            self._fail_request(sequences[0].state, _as_server_error(error))
        self.report()

    # --- reports --------------------------------------------------------------------------------------

    def _emit(self, sequence: Sequence, event: Event) -> None:
        self._events.setdefault(sequence.request.request_id, []).append(event)

    def report(self) -> None:
        """Between two steps: take over what was built meanwhile, and show what runs, waits and is held."""
        self._last_report = time.perf_counter()
        self.manager.settle()
        running, waiting = self.scheduler.running, self.scheduler.waiting
        unread = sum(s.num_remaining for s in waiting if s.context is None)
        self._recorder.running(len(running), len(waiting), unread)
        prefills = [s for s in running if s.is_prefilling]
        self._recorder.prefill_progress(sum(s.num_computed for s in prefills), sum(len(s.token_ids) for s in prefills))
        stats = self.manager.stats()
        tails = {"cpu": 0, "cuda": 0}
        staging = self.manager.staging_bytes + self.manager.background_bytes
        for context in (s.context for s in (*running, *waiting) if s.context is not None):
            tails[context.tail.device.type] += context.tail_bytes
            staging += context.staging_bytes
        self._recorder.memory("host", "kv", stats.kv_bytes + tails["cpu"])
        if self.runner.device.type == "cuda":
            self._recorder.memory("device", "kv", tails["cuda"])
        self._recorder.memory("host", "index", stats.index_bytes)
        self._recorder.memory("host", "staging", staging)
        step_bytes = self.step_bytes if prefills else 0
        self._recorder.memory("host", "step", step_bytes)
        self._see_overhead(stats.kv_bytes + tails["cpu"] + stats.index_bytes + staging + step_bytes)
        self._recorder.memory_budget("host", stats.reserved_bytes, stats.limit_bytes)
        self._recorder.segments("host", stats.num_segments)
        self._report_disk()
        self._recorder.index_builds_pending(self.manager.num_pending_builds)
        self.sessions.report()

    def _see_overhead(self, accounted_bytes: int) -> None:
        """What the process holds above its base and all that the budget is of, and what its next prefill will take."""
        if self.base_bytes:
            uncounted = resident_bytes() - self.base_bytes - accounted_bytes
            self.manager.budget.overhead_bytes = self.step_bytes + max(0, uncounted)

    def _report_disk(self) -> None:
        if self.manager.has_disk:
            disk = self.manager.disk_stats
            self._recorder.memory("disk", "kv", disk.kv_bytes)
            self._recorder.memory("disk", "index", disk.index_bytes)
            self._recorder.segments("disk", disk.num_segments)

    def idle_seconds(self) -> float | None:
        """How long nothing will happen by itself while there is no work; None: ever."""
        return 0.2 if self.manager.is_settling else self.sessions.seconds_to_expiry()


def _work(chunk: Chunk) -> Work:
    sequence = chunk.sequence
    tokens = sequence.token_ids[sequence.num_computed : sequence.num_computed + chunk.num_tokens]
    return Work(sequence.context, tokens, chunk.is_decode, _num_logits(chunk))


def _num_logits(chunk: Chunk) -> int:
    """All rows where the prompt itself is scored, else the last row, if a token follows it."""
    if chunk.sequence.scores_prompt and not chunk.is_decode:
        return chunk.num_tokens
    return int(chunk.num_tokens == chunk.sequence.num_remaining)


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
