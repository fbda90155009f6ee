"""The simulated cache, and that the server's policy is worth having."""

from __future__ import annotations

import statistics

import pytest

from scripts.bench.policy_sim.simulate import Cache, cost, lru, make_offline, ours, simulate, size
from scripts.bench.policy_sim.traces import TRACES, Block, Request, make_trace

A, B, C = (Block(key, None, 0, 1000) for key in (1, 2, 3))
TAIL = Block(4, 1, 1000, 10)


def trace_of(*paths: tuple[Block, ...]) -> list[Request]:
    return [Request(float(i), path) for i, path in enumerate(paths)]


def test_what_fits_is_computed_once() -> None:
    outcome = simulate(trace_of((A,), (B,), (A, TAIL), (A, TAIL), (B,)), 10 * size(A), lru)
    assert outcome.again_seconds == 0
    assert outcome.first_seconds == pytest.approx(cost(A) + cost(B) + cost(TAIL))


def test_lru_loses_a_cycle_and_the_future_does_not() -> None:
    trace = trace_of(*[(A,), (B,), (C,)] * 4)
    assert simulate(trace, 2 * size(A), lru).again_seconds == pytest.approx(9 * cost(A))
    assert simulate(trace, 2 * size(A), make_offline(trace)).again_seconds < 6 * cost(A)


def test_a_block_leaves_after_what_continues_it_and_its_loss_costs_both() -> None:
    for limit_bytes, num_left in ((2 * size(A), 1), (size(A) + size(TAIL), 0)):
        cache = Cache(limit_bytes, lru)
        for step, path in enumerate([(A, TAIL), (B,)]):
            cache.use(path, float(step), step)
        assert (cache.find((A, TAIL)), cache.find((B,))) == (num_left, 1)
        assert cache.used_bytes == size(B) + num_left * size(A)


def test_a_running_request_keeps_its_own_path() -> None:
    cache = Cache(size(A), ours)
    cache.use((A, TAIL), 0.0, 0)
    assert cache.find((A, TAIL)) == 2, "more than the limit, as nothing else could go"


@pytest.mark.parametrize("name", TRACES)
def test_traces_are_what_they_say(name: str) -> None:
    trace = make_trace(name, 600, seed=1)
    assert trace == make_trace(name, 600, seed=1)
    assert trace != make_trace(name, 600, seed=2)
    assert [r.seconds for r in trace] == sorted(r.seconds for r in trace)
    for request in trace:
        ends = [0, *(b.start + b.num_tokens for b in request.path)]
        assert [b.start for b in request.path] == ends[:-1]
        assert [b.parent for b in request.path] == [None, *(b.key for b in request.path[:-1])]


def test_chats_have_a_median_of_forty_turns() -> None:
    trace = make_trace("chats", 20_000, seed=0)
    turns: dict[int, int] = {}
    for request in trace:
        turns[request.path[0].key] = max(turns.get(request.path[0].key, 0), len(request.path))
    assert 35 <= statistics.median(turns.values()) <= 45


@pytest.mark.parametrize(("name", "mib"), [("documents", 1024), ("chats", 128), ("one-shot", 512), ("mixed", 512)])
def test_the_servers_policy_beats_lru(name: str, mib: int) -> None:
    sums = {"lru": 0.0, "ours": 0.0, "offline": 0.0}
    for seed in range(2):
        trace = make_trace(name, 600, seed)
        for policy_name, policy in (("lru", lru), ("ours", ours), ("offline", make_offline(trace))):
            sums[policy_name] += simulate(trace, mib * 2**20, policy).again_seconds
    assert sums["offline"] <= sums["ours"] < sums["lru"]
