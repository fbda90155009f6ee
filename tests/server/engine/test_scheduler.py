"""The scheduler under a fake clock: everything finishes, nothing starves, and every step keeps its budgets."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.request import Request, SamplingParams
from server.engine.scheduler import (
    FAIR_SHARE,
    MAX_SCORED_TOKENS,
    MIN_CHUNK_TOKENS,
    STREAM_TOKENS,
    Chunk,
    Limits,
    Scheduler,
    StepCost,
)
from server.engine.sequence import RequestState, Sequence

PER_TOKEN, PER_PAIR, PER_DECODE = 2e-4, 1e-3, 2e-3  # seconds; pairs in millions
K = 1024


def sequence_of(
    num_prompt: int, num_new: int = 4, *, arrival: float = 0.0, priority: int = 0, n: int = 1, name: str = "r"
) -> Sequence:
    request = Request(name, (0,) * num_prompt, SamplingParams(n=n), priority=priority, max_new_tokens=num_new)
    return Sequence(RequestState(request, arrival), 0, [0] * num_prompt)


def computed(sequence: Sequence, num_generated: int = 1) -> Sequence:
    """As after its prompt and `num_generated` tokens: it decodes."""
    sequence.token_ids += [0] * num_generated
    sequence.num_computed = len(sequence.token_ids) - 1
    return sequence


def prefill_seconds(chunks: Iterable[Chunk]) -> float:
    prefills = [(c.num_tokens, c.sequence.num_computed) for c in chunks if not c.is_decode]
    return sum(PER_TOKEN * n + PER_PAIR * n * (p + n / 2) / 1e6 for n, p in prefills)


@dataclass
class Simulation:
    """An engine without a model: it holds memory in tokens, knows what steps cost, and checks each of them."""

    limits: Limits
    memory_tokens: int = 1 << 40
    now: float = 0.0
    used_tokens: int = 0
    num_steps: int = 0
    arrivals: list[Sequence] = field(default_factory=list)
    finished: list[Sequence] = field(default_factory=list)
    first_token_step: dict[str, int] = field(default_factory=dict)
    chunks: list[Chunk] = field(default_factory=list)  # of the last step
    on_step: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.limits, self.admit)

    def admit(self, sequence: Sequence) -> bool:
        """Reserve the worst case, once."""
        if sequence.context is not None:
            return True
        needed = sequence.num_prompt_tokens + sequence.request.sampling.n * sequence.request.max_new_tokens
        if self.used_tokens + needed > self.memory_tokens:
            return False
        self.used_tokens += needed
        sequence.context = [needed]
        return True

    def run(self, max_steps: int) -> None:
        """Until nothing is left to do; fails when that takes more than `max_steps`."""
        while self.scheduler.has_work or self.arrivals:
            assert self.num_steps < max_steps, f"{len(self.finished)} finished after {max_steps} steps"
            self.step()

    def step(self) -> None:
        """Take what has arrived, schedule, check, compute, sample."""
        self.num_steps += 1
        for sequence in [s for s in self.arrivals if s.state.arrival <= self.now]:
            self.arrivals.remove(sequence)
            self.scheduler.add(sequence)
        self.chunks, preempted = self.scheduler.schedule()
        self.check(preempted)
        decode_seconds = PER_DECODE * any(c.is_decode for c in self.chunks)
        seconds = decode_seconds + prefill_seconds(self.chunks)
        positions = [c.sequence.num_computed for c in self.chunks]
        self.scheduler.cost.observe(seconds, self.chunks, positions)
        self.now += seconds or 1e-3
        for chunk in self.chunks:
            self.compute(chunk)
        self.on_step()

    def check(self, preempted: list[Sequence]) -> None:
        scheduler = self.scheduler
        decodes = [c.sequence for c in self.chunks if c.is_decode]
        assert decodes == [s for s in scheduler.running if not s.is_prefilling], "every running sequence decodes"
        assert [c.is_decode for c in self.chunks] == sorted((c.is_decode for c in self.chunks), reverse=True)
        assert sum(c.num_tokens for c in self.chunks) <= self.limits.max_num_batched_tokens
        assert len({id(c.sequence) for c in self.chunks}) == len(self.chunks)
        assert all(0 < c.num_tokens <= c.sequence.num_remaining for c in self.chunks)
        assert all(c.sequence in scheduler.running and c.sequence.status == "running" for c in self.chunks)
        slots = sum(s.request.sampling.n if s.num_generated == 0 and s.choice == 0 else 1 for s in scheduler.running)
        assert slots <= self.limits.max_num_seqs
        assert all(s.status == "waiting" and s.context is not None for s in preempted)
        assert bool(self.chunks) or not scheduler.running, "what runs makes progress"

    def compute(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        is_last = chunk.num_tokens == sequence.num_remaining
        sequence.num_computed += chunk.num_tokens
        if not is_last:
            return
        siblings = [sequence]
        if sequence.num_generated == 0 and sequence.choice == 0:
            for choice in range(1, sequence.request.sampling.n):
                twin = Sequence(sequence.state, choice, list(sequence.token_ids), num_computed=sequence.num_computed)
                twin.context = sequence.context
                self.scheduler.add_running(twin)
                siblings.append(twin)
        for sibling in siblings:
            self.first_token_step.setdefault(sibling.request.request_id, self.num_steps)
            sibling.token_ids.append(0)
            if sibling.num_generated >= sibling.request.max_new_tokens:
                self.finish(sibling)

    def finish(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        self.finished.append(sequence)
        done = [s for s in self.finished if s.state is sequence.state]
        if len(done) == sequence.request.sampling.n:
            self.used_tokens -= sequence.context[0]


LIMITS = Limits(max_num_seqs=4, max_num_batched_tokens=2048, step_time_budget_seconds=0.1)
workloads = st.lists(
    st.tuples(
        st.sampled_from([1, 15, 100, 2048, 5000, 20_000]),  # prompt
        st.integers(1, 12),  # new tokens
        st.floats(0, 3),  # arrival
        st.integers(0, 2),  # priority
        st.sampled_from([1, 1, 1, 2, 4]),  # choices
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(workload=workloads, memory=st.sampled_from([1 << 40, 21_000, 45_000]), budget=st.sampled_from([0.0, 0.02, 0.1]))
def test_every_sequence_finishes(workload: list[tuple[int, int, float, int, int]], memory: int, budget: float) -> None:
    simulation = Simulation(Limits(4, 2048, budget), memory)
    for i, (num_prompt, num_new, arrival, priority, n) in enumerate(workload):
        sequence = sequence_of(num_prompt, num_new, arrival=arrival, priority=priority, n=n, name=str(i))
        simulation.arrivals.append(sequence)
    simulation.run(max_steps=20_000)
    assert len(simulation.finished) == sum(n for *_, n in workload)
    assert all(s.num_generated == s.request.max_new_tokens for s in simulation.finished)
    assert all(s.status == "finished" for s in simulation.finished)
    assert simulation.used_tokens == 0


def test_a_short_prompt_behind_a_long_prefill_gets_its_first_token_at_once() -> None:
    simulation = Simulation(LIMITS)
    simulation.scheduler.add(sequence_of(128 * K, name="document"))
    for _ in range(5):
        simulation.step()
    simulation.scheduler.add(sequence_of(200, name="question"))
    began = simulation.num_steps
    while "question" not in simulation.first_token_step:
        simulation.step()
        assert simulation.num_steps - began <= 2  # the fair share may come first


def test_a_long_prefill_is_not_starved_by_a_stream_of_short_prompts() -> None:
    simulation = Simulation(Limits(4, 512, 0.0))
    document = sequence_of(16 * K, name="document")
    simulation.scheduler.add(document)
    names = itertools.count()

    def keep_busy() -> None:
        while len(simulation.scheduler.running) + len(simulation.scheduler.waiting) < 4:
            simulation.scheduler.add(sequence_of(500, 1, arrival=simulation.now, name=f"short-{next(names)}"))

    simulation.on_step = keep_busy
    while "document" not in simulation.first_token_step:
        simulation.step()
        assert simulation.num_steps <= 2 * FAIR_SHARE * 16 * K / 512
    assert next(names) > 50, "the short ones went on meanwhile"


def test_two_long_prefills_both_advance() -> None:
    simulation = Simulation(Limits(4, 512, 0.0))
    first, second = sequence_of(8 * K, name="first"), sequence_of(8 * K, name="second", arrival=0.1)
    simulation.scheduler.add(first)
    simulation.scheduler.add(second)
    for _ in range(3 * FAIR_SHARE):
        simulation.step()
    assert first.num_computed > second.num_computed >= 512


def test_a_large_request_is_not_passed_by_a_stream_of_small_ones_that_fit() -> None:
    simulation = Simulation(LIMITS, memory_tokens=10_000)
    names = itertools.count()

    def keep_busy() -> None:
        while len(simulation.scheduler.running) + len(simulation.scheduler.waiting) < 4:
            simulation.scheduler.add(sequence_of(3000, 20, arrival=simulation.now, name=f"small-{next(names)}"))

    simulation.on_step = keep_busy
    keep_busy()
    simulation.step()
    simulation.scheduler.add(sequence_of(9000, 1, arrival=simulation.now, name="large"))
    while "large" not in simulation.first_token_step:
        simulation.step()
        assert simulation.num_steps < 300


def test_decodes_are_in_every_step_beside_a_prefill() -> None:
    simulation = Simulation(LIMITS)
    for i in range(3):
        simulation.scheduler.add(sequence_of(10, 400, name=f"chat-{i}"))
    simulation.step()
    simulation.scheduler.add(sequence_of(64 * K, 1, arrival=1.0, name="document"))
    while "document" not in simulation.first_token_step:
        simulation.step()
        assert sum(c.is_decode for c in simulation.chunks) == 3
    assert all(s.num_generated == simulation.num_steps for s in simulation.scheduler.running)


@pytest.mark.parametrize("budget_seconds", [0.02, 0.05, 0.1])
def test_steps_with_decodes_keep_the_time_budget_once_costs_are_known(budget_seconds: float) -> None:
    simulation = Simulation(Limits(4, 2048, budget_seconds))
    simulation.scheduler.add(sequence_of(10, 3000, name="chat"))
    for _ in range(40):
        simulation.step()  # the decode step's own cost is learned
    simulation.scheduler.add(sequence_of(100 * K, 1, arrival=1.0, name="document"))
    tokens = []
    while "document" not in simulation.first_token_step:
        before = simulation.now
        simulation.step()
        if len(simulation.chunks) == 2 and len(tokens) > 3:  # the first chunks are measurements
            assert simulation.now - before <= 1.1 * budget_seconds
        tokens += [c.num_tokens for c in simulation.chunks if not c.is_decode]
    assert tokens[5] > tokens[-2] >= MIN_CHUNK_TOKENS, "chunks shrink as their keys grow"
    per_chunk = PER_TOKEN + PER_PAIR * 50 * K / 1e6
    assert len(tokens) < 3 * 100 * K * per_chunk / budget_seconds, "the budget is used"


def test_a_budget_too_small_for_anything_still_makes_progress() -> None:
    simulation = Simulation(Limits(4, 2048, 1e-6))
    simulation.scheduler.add(sequence_of(10, 400, name="chat"))
    for _ in range(20):
        simulation.step()
    document = sequence_of(8 * K, 1, name="document")
    simulation.scheduler.add(document)
    for _ in range(10):
        simulation.step()
    done = document.num_computed
    simulation.step()
    assert document.num_computed == done + MIN_CHUNK_TOKENS


def test_without_decodes_a_prefill_takes_the_whole_token_budget() -> None:
    simulation = Simulation(Limits(4, 2048, 0.01))
    document = sequence_of(64 * K)
    simulation.scheduler.add(document)
    for step in range(1, 6):
        simulation.step()
        assert document.num_computed == 2048 * step


def test_one_step_holds_several_short_prefills() -> None:
    simulation = Simulation(LIMITS)
    for i in range(4):
        simulation.scheduler.add(sequence_of(300, name=str(i)))
    simulation.step()
    assert [c.num_tokens for c in simulation.chunks] == [300] * 4


def test_rows_of_scored_prompts_are_bounded_over_the_step() -> None:
    scheduler = Scheduler(Limits(8, 4096, 0.0), lambda sequence: True)
    params = SamplingParams(num_prompt_logprobs=1)
    scored = [
        Sequence(RequestState(Request(name, (0,) * K, params, max_new_tokens=4), 0.0), 0, [0] * K) for name in "ab"
    ]
    plain = sequence_of(K, name="c")
    for sequence in (*scored, plain):
        scheduler.add(sequence)
    chunks, _ = scheduler.schedule()
    assert sum(c.num_tokens for c in chunks if c.sequence in scored) == MAX_SCORED_TOKENS
    assert [c.num_tokens for c in chunks if c.sequence is plain] == [K]


def test_the_queue_goes_by_priority_then_arrival() -> None:
    scheduler = Scheduler(Limits(1, 2048, 0.0), lambda sequence: True)
    late, early = sequence_of(10, arrival=2.0, name="late"), sequence_of(10, arrival=1.0, name="early")
    urgent = sequence_of(10, arrival=3.0, priority=-1, name="urgent")
    for sequence in (late, early, urgent):
        scheduler.add(sequence)
    assert [s.request.request_id for s in scheduler.waiting] == ["urgent", "early", "late"]
    scheduler.schedule()
    assert scheduler.running == [urgent]


def test_preemption_keeps_the_context_and_computes_nothing_twice() -> None:
    simulation = Simulation(Limits(1, 512, 0.0))
    low = sequence_of(2000, 3, priority=5, name="low")
    simulation.scheduler.add(low)
    simulation.step()
    simulation.step()
    context = low.context
    simulation.scheduler.add(sequence_of(100, 2, arrival=9.0, priority=0, name="high"))
    simulation.step()
    assert (low.status, low.num_computed, low.context) == ("waiting", 1024, context)
    assert [s.request.request_id for s in simulation.scheduler.running] == ["high"]
    simulation.run(max_steps=50)
    assert [s.request.request_id for s in simulation.finished] == ["high", "low"]
    assert low.context is context
    assert low.num_computed == 2000 + 3 - 1


def test_equal_priority_preempts_nobody() -> None:
    simulation = Simulation(Limits(1, 512, 0.0))
    simulation.scheduler.add(sequence_of(100, 20, arrival=5.0, name="running"))
    simulation.step()
    simulation.scheduler.add(sequence_of(100, 1, arrival=1.0, name="waiting"))
    simulation.run(max_steps=50)
    assert [s.request.request_id for s in simulation.finished] == ["running", "waiting"]


def test_the_newest_of_the_lowest_priority_is_preempted() -> None:
    scheduler = Scheduler(Limits(3, 512, 0.0), lambda sequence: True)
    older = sequence_of(100, arrival=1.0, priority=5, name="older")
    newer = sequence_of(100, arrival=2.0, priority=5, name="newer")
    middle = sequence_of(100, arrival=3.0, priority=3, name="middle")
    for sequence in (older, newer, middle):
        scheduler.add(sequence)
    scheduler.schedule()
    scheduler.add(sequence_of(100, arrival=4.0, priority=0, name="urgent"))
    assert scheduler.schedule()[1] == [newer]


def test_nobody_is_preempted_for_one_that_is_not_admitted() -> None:
    simulation = Simulation(Limits(1, 512, 0.0), memory_tokens=2000)
    low = sequence_of(1000, 5, priority=5, name="low")
    simulation.scheduler.add(low)
    simulation.step()
    simulation.scheduler.add(sequence_of(1500, 2, arrival=1.0, name="high"))
    for _ in range(3):
        simulation.step()
        assert low.status == "running"
    simulation.run(max_steps=50)
    assert [s.request.request_id for s in simulation.finished] == ["low", "high"]


def test_nobody_is_preempted_where_it_would_not_make_room_enough() -> None:
    scheduler = Scheduler(Limits(3, 512, 0.0), lambda sequence: True)
    equal = [sequence_of(100, arrival=i, name=f"equal-{i}") for i in range(2)]
    low = sequence_of(100, priority=5, name="low")
    for sequence in (*equal, low):
        scheduler.add(sequence)
    scheduler.schedule()
    scheduler.add(sequence_of(100, arrival=9.0, n=3, name="three"))
    assert scheduler.schedule()[1] == []
    assert low in scheduler.running


def test_a_preempted_one_goes_on_while_a_larger_one_waits_for_memory() -> None:
    simulation = Simulation(Limits(1, 512, 0.0), memory_tokens=2500)
    low = sequence_of(1000, 5, priority=5, name="low")
    simulation.scheduler.add(low)
    simulation.step()
    simulation.scheduler.add(sequence_of(100, 2, arrival=1.0, name="small"))
    simulation.scheduler.add(sequence_of(2000, 2, arrival=2.0, name="large"))
    simulation.run(max_steps=50)
    assert [s.request.request_id for s in simulation.finished] == ["small", "low", "large"]


def test_choices_to_come_hold_their_slots_from_the_start() -> None:
    simulation = Simulation(Limits(4, 512, 0.0))
    simulation.scheduler.add(sequence_of(1000, 3, n=3, name="three"))
    simulation.scheduler.add(sequence_of(100, 3, arrival=1.0, n=2, name="two"))
    simulation.step()
    assert len(simulation.scheduler.running) == 1
    simulation.run(max_steps=30)
    assert len(simulation.finished) == 5


def test_removed_sequences_are_forgotten_wherever_they_are() -> None:
    scheduler = Scheduler(Limits(1, 512, 0.0), lambda sequence: True)
    running, waiting = sequence_of(100, name="running"), sequence_of(100, arrival=1.0, name="waiting")
    scheduler.add(running)
    scheduler.add(waiting)
    scheduler.schedule()
    scheduler.remove(running)
    scheduler.remove(waiting)
    assert not scheduler.has_work
    assert (running.status, waiting.status) == ("finished", "finished")
    assert scheduler.schedule() == ([], [])


# --- the cost model -------------------------------------------------------------------------------------


def observe(cost: StepCost, num_tokens: int, position: int, seconds: float, decode: bool = False) -> None:
    chunks, positions = [Chunk(sequence_of(1), num_tokens, False)], [position]
    if decode:
        chunks, positions = [Chunk(computed(sequence_of(1)), 1, True), *chunks], [5, *positions]
    cost.observe(seconds, chunks, positions)


def true_seconds(num_tokens: int, position: int, per_token: float, per_pair: float) -> float:
    pairs = (num_tokens + STREAM_TOKENS) * (position + num_tokens / 2)
    return per_token * num_tokens + per_pair * pairs / 1e6


@pytest.mark.parametrize(("per_token", "per_pair"), [(2e-4, 1e-3), (1e-3, 1e-5), (1e-5, 1e-2), (5e-4, 0.0)])
def test_cost_learns_known_coefficients(per_token: float, per_pair: float) -> None:
    cost = StepCost()
    for step in range(40):
        num_tokens, position = 512 + 64 * (step % 7), 2000 * step
        observe(cost, num_tokens, position, true_seconds(num_tokens, position, per_token, per_pair))
    assert cost.coefficients() == pytest.approx((per_token, per_pair), rel=1e-3, abs=1e-9)


def test_cost_follows_a_machine_that_became_slower() -> None:
    cost = StepCost()
    for slowdown in (1, 3):
        for step in range(60):
            position = 1000 * (step % 20)
            observe(cost, 512, position, slowdown * true_seconds(512, position, PER_TOKEN, PER_PAIR))
    assert cost.coefficients() == pytest.approx((3 * PER_TOKEN, 3 * PER_PAIR), rel=0.1)


def test_cost_learned_from_large_chunks_soon_fits_small_ones() -> None:
    """Small chunks cost half as much again per token: what decides how long the first decodes beside a prefill wait."""
    cost = StepCost()
    for step in range(60):
        observe(cost, 2048, 2048 * step, true_seconds(2048, 2048 * step, PER_TOKEN, PER_PAIR))
    position, waits = 60 * 2048, []
    for _ in range(20):
        num_tokens = cost.chunk_tokens(0.1 - cost.overhead, position)
        waits.append(1.5 * true_seconds(num_tokens, position, PER_TOKEN, PER_PAIR))
        observe(cost, num_tokens, position, waits[-1], decode=True)
        position += num_tokens
    assert max(waits) <= 0.16
    assert max(waits[6:]) <= 0.115
    assert min(waits) >= 0.085, "nor is it frightened into chunks that are too small"


def test_one_slow_step_does_not_starve_the_prefill() -> None:
    cost = StepCost()
    for step in range(60):
        observe(cost, 512, 1000 * step, true_seconds(512, 1000 * step, PER_TOKEN, PER_PAIR))
    before = cost.chunk_tokens(0.1, 60_000)
    observe(cost, 512, 60_000, 20 * true_seconds(512, 60_000, PER_TOKEN, PER_PAIR))
    assert cost.chunk_tokens(0.1, 60_000) >= before * 0.7


def test_a_step_faster_than_decoding_seemed_is_not_taken_for_free() -> None:
    cost = StepCost()
    for _ in range(100):
        cost.observe(0.05, [Chunk(computed(sequence_of(1)), 1, True)], [10])
    for _ in range(20):
        observe(cost, 512, 0, 0.04, decode=True)
    assert cost.chunk_tokens(0.1, 0) <= 512 * 0.1 / 0.004 * 1.1


@pytest.mark.parametrize("overhead_seconds", [0.02, 0.15])
def test_what_a_step_takes_besides_does_not_shrink_chunks_to_nothing(overhead_seconds: float) -> None:
    """As on a machine so busy that every step waits for time slices: smaller chunks would not wait less."""
    scheduler = Scheduler(Limits(8, 2048, 0.1), lambda sequence: True)
    for step in range(30):
        observe(scheduler.cost, 2048, 2048 * step, true_seconds(2048, 2048 * step, PER_TOKEN, PER_PAIR))
    decoding, reading = computed(sequence_of(10, 10**6)), sequence_of(10**6)
    for sequence in (decoding, reading):
        sequence.status = "running"
        scheduler.running.append(sequence)
    reading.num_computed = 30_000
    sizes, waits = [], []
    for _ in range(300):
        chunks, _ = scheduler.schedule()
        position, num_tokens = reading.num_computed, chunks[-1].num_tokens
        waits.append(overhead_seconds + true_seconds(num_tokens, position, PER_TOKEN, PER_PAIR))
        scheduler.cost.observe(waits[-1], chunks, [10, position])
        sizes.append(true_seconds(num_tokens, position, PER_TOKEN, PER_PAIR))
    assert min(sizes) >= 0.035, "seconds of work that was got done"
    assert max(waits[10:]) <= max(0.11, overhead_seconds + 0.065)


@pytest.mark.parametrize("noise", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("budget", [0.1, 0.2])
def test_steps_beside_a_long_prompt_keep_to_the_budget(budget: float, noise: float) -> None:
    """Whose times scatter upwards, as real ones do: no overhead must be made of that, which would free the terms."""
    scheduler, random_ = Scheduler(Limits(8, 2048, budget), lambda sequence: True), random.Random(1)
    decoding, reading = computed(sequence_of(10, 10**6)), sequence_of(1 << 17)
    for sequence in (decoding, reading):
        sequence.status = "running"
        scheduler.running.append(sequence)
    waits, per_token, per_pair = [], 5e-5, 5e-3  # the bundled model's, in seconds
    while reading.num_remaining:
        chunks, _ = scheduler.schedule()
        position, num_tokens = reading.num_computed, chunks[-1].num_tokens
        seconds = 0.008 + true_seconds(num_tokens, position, per_token, per_pair)
        waits.append(seconds * (1 + noise * abs(random_.gauss(0, 0.5))))
        scheduler.cost.observe(waits[-1], chunks, [10, position])
        reading.num_computed += num_tokens
    assert len(waits) < 2000
    assert sorted(waits)[int(0.99 * len(waits))] <= 2 * budget


def test_cost_takes_the_decodes_out_of_mixed_steps() -> None:
    cost = StepCost()
    for _ in range(100):
        cost.observe(0.05, [Chunk(computed(sequence_of(1)), 1, True)], [10])
    assert cost.decode_seconds == pytest.approx(0.05, rel=1e-3)
    for step in range(40):
        position = 1000 * step
        seconds = 0.05 + true_seconds(512, position, PER_TOKEN, PER_PAIR)
        observe(cost, 512, position, seconds, decode=True)
    assert cost.coefficients() == pytest.approx((PER_TOKEN, PER_PAIR), rel=0.02)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(steps=st.lists(st.tuples(st.integers(1, 2048), st.integers(0, 1 << 17), st.floats(0, 10)), max_size=20))
def test_coefficients_are_never_negative(steps: list[tuple[int, int, float]]) -> None:
    cost = StepCost()
    for num_tokens, position, seconds in steps:
        observe(cost, num_tokens, position, seconds)
    assert min(cost.coefficients()) >= 0


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    per_token=st.floats(1e-6, 1e-2),
    per_pair=st.one_of(st.just(0.0), st.floats(1e-9, 1.0)),
    position=st.integers(0, 1 << 20),
    seconds=st.floats(0.0, 5.0),
)
def test_chunk_tokens_inverts_the_cost(per_token: float, per_pair: float, position: int, seconds: float) -> None:
    class Known(StepCost):
        def coefficients(self) -> tuple[float, float]:
            return per_token, per_pair

    num_tokens = Known().chunk_tokens(seconds, position)
    slack = 1e-6 * (seconds + true_seconds(1, position, per_token, per_pair))
    assert num_tokens == 0 or true_seconds(num_tokens, position, per_token, per_pair) <= seconds + slack
    assert true_seconds(num_tokens + 1, position, per_token, per_pair) >= seconds - slack


def test_an_unknown_cost_is_taken_for_about_a_tenth_of_a_millisecond_per_token() -> None:
    assert 500 < StepCost().chunk_tokens(0.1, 1 << 17) <= 1000
