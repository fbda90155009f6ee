"""Decides what each step computes: who is admitted, which sequences decode, how large a prefill chunk is.

Pure bookkeeping without tensors, clocks or threads. Policy: every running sequence decodes in every step;
what is left of the token (and time) budget goes to prefills, the one with the fewest tokens left first,
so that a short question never waits behind a long document, and every `FAIR_SHARE`-th chunk goes to the
one that has waited longest, so that the long document is not starved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from server.engine.sequence import Sequence

FAIR_SHARE = 4
MIN_CHUNK_TOKENS = 16  # progress even where the time budget is tight
MIN_SHARE = 0.5  # of the time budget is the prefills', however much the rest of a step takes
STREAM_TOKENS = 30  # reading and packing K and V for a chunk, however small, costs about what as many queries do
MAX_SCORED_TOKENS = 256  # of a step, of prompts that are scored: each one's logits take vocab_size floats


@dataclass(frozen=True, slots=True)
class Chunk:
    """`num_tokens` of one sequence in the next step."""

    sequence: Sequence
    num_tokens: int
    is_decode: bool


class StepCost:
    """Learns seconds = overhead + per_token * n + per_pair * (n + STREAM_TOKENS) * (position + n / 2) from the steps.

    The two terms come from least squares of relative errors with forgetting: a small chunk tells as much as a large
    one. `overhead` follows the last few steps: what a step takes besides, such as streaming K and V for however few
    queries, or waiting for time slices on a busy machine. Blamed on the tokens, it would make the next chunk smaller,
    whose tokens would then seem dearer still.
    """

    GAIN = 0.3  # of the overhead, for each step
    KEEP = 0.9  # of it: what the terms explain as well is theirs
    NUM_FIRST = 8  # steps that go to the terms alone, which begin as a guess
    MIN_SECONDS = 1e-6

    def __init__(self, forgetting: float = 0.9) -> None:
        self._forgetting = forgetting
        self._xx, self._xy, self._yy = 1e-6, 0.0, 1e-6  # normal matrix of features (n, pairs in millions) per second
        self._xt, self._yt = 1e-10, 1e-10
        self._num_learned = 0
        self.overhead = 0.0  # seconds of a step with decodes, besides them and the terms
        self.decode_seconds = 0.0  # moving mean of a step without prefill
        self._alone: tuple[float, float] | None = None  # the terms when a prefill last ran without decodes

    def observe(self, seconds: float, chunks: list[Chunk], positions: list[int]) -> None:
        """Learn from a step; `positions` are the chunks' first token positions."""
        prefills = [(c.num_tokens, p) for c, p in zip(chunks, positions, strict=True) if not c.is_decode]
        if not prefills:
            self.decode_seconds += 0.1 * (seconds - self.decode_seconds)
            return
        pairs = sum(_pairs(n, p) for n, p in prefills) / 1e6
        if len(prefills) < len(chunks):  # at least a tenth was the prefill's, however slow all else seemed lately
            own = seconds - self.decode_seconds
            self._follow(own, sum(n for n, _ in prefills), pairs)
            seconds = max(0.1 * seconds, own - self.overhead)
        seconds = max(seconds, self.MIN_SECONDS)
        x, y = sum(n for n, _ in prefills) / seconds, pairs / seconds
        self._num_learned += 1
        keep = self._forgetting
        self._xx, self._xy, self._yy = keep * self._xx + x * x, keep * self._xy + x * y, keep * self._yy + y * y
        self._xt, self._yt = keep * self._xt + x, keep * self._yt + y
        if len(prefills) == len(chunks):
            self._alone = self.coefficients()

    def _follow(self, seconds: float, num_tokens: int, pairs: float) -> None:
        """Move the overhead towards what the last step says, an outlier no more than twice what was expected."""
        if self._num_learned < self.NUM_FIRST:
            return
        per_token, per_pair = self.coefficients()
        expected = per_token * num_tokens + per_pair * pairs
        error = min(expected, max(-expected, seconds - expected - self.overhead))
        self.overhead = max(0.0, self.KEEP * self.overhead + self.GAIN * error)

    def coefficients(self) -> tuple[float, float]:
        """Seconds per token, and per million (query, key) pairs; neither negative."""
        determinant = self._xx * self._yy - self._xy * self._xy
        if determinant > 1e-9 * self._xx * self._yy:
            per_token = (self._xt * self._yy - self._yt * self._xy) / determinant
            per_pair = (self._yt * self._xx - self._xt * self._xy) / determinant
            if per_token >= 0 and per_pair >= 0:
                return per_token, per_pair
            if per_token < 0:
                return 0.0, self._yt / self._yy
        return self._xt / self._xx, 0.0

    def chunk_tokens(self, seconds: float, position: int) -> int:
        """Tokens at `position` that fit into `seconds`: the positive root of
        a n + b (n + STREAM_TOKENS) (position + n / 2) = seconds."""
        return _fitting(*self.coefficients(), seconds, position)

    def least_tokens(self, seconds: float, position: int) -> int:
        """The same by what prefills cost alone: on a machine so busy that steps wait whatever they do, smaller chunks
        would not wait less."""
        return _fitting(*self._alone, seconds, position) if self._alone is not None else 0


def _fitting(per_token: float, per_pair: float, seconds: float, position: int) -> int:
    b = per_pair / 1e6
    a = per_token + b * (position + STREAM_TOKENS / 2)
    left = max(0.0, seconds - b * STREAM_TOKENS * position)
    if a <= 0 and b <= 0:
        return 1 << 20
    if b * left < 1e-12 * max(a, 1e-12):
        return int(left / max(a, 1e-12))
    return int(((a * a + 2 * b * left) ** 0.5 - a) / b)


def _pairs(num_tokens: int, position: int) -> float:
    """(query, key) pairs of a chunk, and those that reading the keys is worth."""
    return (num_tokens + STREAM_TOKENS) * (position + num_tokens / 2)


@dataclass(frozen=True, slots=True)
class Limits:
    """The scheduler's bounds; units as in `EngineConfig`."""

    max_num_seqs: int
    max_num_batched_tokens: int
    step_time_budget_seconds: float  # 0: no time budget


class Scheduler:
    """Queues and running set. `admit` is asked before a sequence starts and may say 'not yet'."""

    def __init__(self, limits: Limits, admit: Callable[[Sequence], bool]) -> None:
        self._limits, self._admit = limits, admit
        self.cost = StepCost()
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._step_number = 0

    @property
    def has_work(self) -> bool:
        """Anything waiting or running."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence by priority, then arrival."""
        self.waiting.append(sequence)
        self.waiting.sort(key=_queue_order)

    def add_running(self, sequence: Sequence) -> None:
        """A fork of a running sequence, which its admission already counted."""
        sequence.status = "running"
        self.running.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence wherever it is."""
        for queue in (self.waiting, self.running):
            if sequence in queue:
                queue.remove(sequence)
        sequence.status = "finished"

    def schedule(self) -> tuple[list[Chunk], list[Sequence]]:
        """The next step's chunks (decodes first), and the sequences preempted to make room."""
        self._step_number += 1
        preempted = self._start_waiting()
        decodes = [Chunk(s, 1, True) for s in self.running if not s.is_prefilling]
        return decodes + self._prefills(bool(decodes), self._limits.max_num_batched_tokens - len(decodes)), preempted

    def _start_waiting(self) -> list[Sequence]:
        """Admit in queue order and return whom that preempted. Nothing passes one that must wait, except what was
        preempted before: it holds its memory already, and the one that waits may be waiting for just that."""
        preempted: list[Sequence] = []
        is_blocked = False
        for sequence in list(self.waiting):
            if is_blocked and sequence.context is None:
                continue
            victims = self._victims(sequence)
            if victims is None or not self._admit(sequence):
                is_blocked = True
                continue
            for victim in victims:
                self._preempt(victim)
            preempted += victims
            self._start(sequence)
        return preempted

    def _start(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        sequence.status = "running"
        sequence.last_chunk_step = self._step_number  # it waits for its first chunk from now on, not from step 0
        self.running.append(sequence)

    def _num_slots(self) -> int:
        return self._limits.max_num_seqs - sum(_slots_needed(s) for s in self.running)

    def _victims(self, sequence: Sequence) -> list[Sequence] | None:
        """Running sequences of strictly lower priority to preempt for its slots, newest of the lowest first; None:
        not even all of them would do."""
        candidates = [s for s in self.running if s.request.priority > sequence.request.priority]
        candidates.sort(key=_queue_order)
        victims: list[Sequence] = []
        num_missing = _slots_needed(sequence) - self._num_slots()
        while num_missing > 0:
            if not candidates:
                return None
            victims.append(candidates.pop())
            num_missing -= _slots_needed(victims[-1])
        return victims

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue; it keeps its context, so nothing is computed twice."""
        self.running.remove(sequence)
        sequence.status = "waiting"
        self.add(sequence)

    def _prefills(self, has_decodes: bool, token_budget: int) -> list[Chunk]:
        budgeted = has_decodes and self._limits.step_time_budget_seconds > 0
        budget = self._limits.step_time_budget_seconds
        seconds = max(MIN_SHARE * budget, budget - self.cost.decode_seconds - self.cost.overhead)
        chunks: list[Chunk] = []
        num_scorable = MAX_SCORED_TOKENS
        for sequence in self._prefill_order():
            if token_budget <= 0 or (budgeted and chunks and seconds <= 0):
                break
            num_tokens = min(sequence.num_remaining, token_budget)
            if sequence.scores_prompt:
                num_tokens = min(num_tokens, num_scorable)
            if budgeted:
                position = sequence.num_computed
                fitting = self.cost.chunk_tokens(seconds, position)
                if not chunks:
                    fitting = max(fitting, self.cost.least_tokens(min(seconds, MIN_SHARE * budget), position))
                num_tokens = min(num_tokens, max(fitting, 0 if chunks else MIN_CHUNK_TOKENS))
                per_token, per_pair = self.cost.coefficients()
                pairs = _pairs(num_tokens, sequence.num_computed) / 1e6
                seconds -= per_token * num_tokens + per_pair * pairs
            if num_tokens > 0:
                sequence.last_chunk_step = self._step_number
                chunks.append(Chunk(sequence, num_tokens, False))
                num_scorable -= num_tokens * sequence.scores_prompt
                token_budget -= num_tokens
        return chunks

    def _prefill_order(self) -> list[Sequence]:
        """Fewest remaining tokens first; on every `FAIR_SHARE`-th step the longest-waiting one leads."""
        prefilling = [s for s in self.running if s.is_prefilling]
        prefilling.sort(key=lambda s: (s.request.priority, s.num_remaining, s.state.arrival))
        if self._step_number % FAIR_SHARE == 0 and prefilling:
            oldest = min(prefilling, key=lambda s: (s.last_chunk_step, s.state.arrival))
            prefilling.remove(oldest)
            prefilling.insert(0, oldest)
        return prefilling


def _queue_order(sequence: Sequence) -> tuple[int, float, int]:
    return (sequence.request.priority, sequence.state.arrival, sequence.choice)


def _slots_needed(sequence: Sequence) -> int:
    """A prefilling first choice stands for all `n` until it forks."""
    is_forking = sequence.choice == 0 and sequence.num_generated == 0
    return sequence.request.sampling.n if is_forking else 1
