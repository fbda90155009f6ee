"""Live recall: what it measures, and that a check that fails harms nothing."""

from __future__ import annotations

import logging
import math
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from retrieval.probe import LiveProbe, measure

QUERY = torch.tensor([1.0, 0.0])
KEYS = torch.tensor([[0.0, 5.0], [3.0, 0.0], [1.0, 0.0], [2.0, 0.0]])  # scores 0, 3, 1, 2


def test_everything_found_is_perfect() -> None:
    quality = measure(QUERY, KEYS, torch.tensor([1, 3]), 2, 1.0)
    assert (quality.recall, quality.captured_mass) == (1.0, 1.0)


def test_captured_mass_weighs_what_was_missed() -> None:
    best, second, third = math.exp(3), math.exp(2), math.exp(1)
    missed_best = measure(QUERY, KEYS, torch.tensor([3, 2]), 2, 1.0)
    assert missed_best.recall == 0.5
    assert missed_best.captured_mass == pytest.approx((second + third) / (best + second), rel=1e-6)
    missed_second = measure(QUERY, KEYS, torch.tensor([1, -1]), 2, 1.0)
    assert missed_second.captured_mass == pytest.approx(best / (best + second), rel=1e-6)


def test_scale_belongs_to_the_mass() -> None:
    quality = measure(QUERY, KEYS, torch.tensor([3]), 2, 0.5)
    assert quality.captured_mass == pytest.approx(math.exp(1) / (math.exp(1.5) + math.exp(1)), rel=1e-6)


def test_nothing_found_is_zero() -> None:
    quality = measure(QUERY, KEYS, torch.tensor([-1, -1]), 2, 1.0)
    assert (quality.recall, quality.captured_mass) == (0.0, 0.0)


def test_fewer_keys_than_asked_for() -> None:
    assert measure(QUERY, KEYS, torch.tensor([0, 1, 2, 3, -1, -1]), 6, 1.0).recall == 1.0


def test_large_scores_do_not_overflow() -> None:
    quality = measure(QUERY * 1e4, KEYS, torch.tensor([3]), 2, 1.0)
    assert (quality.recall, quality.captured_mass) == (0.5, 0.0)


def indexed_run(world: Any) -> Any:
    context = world.context([60], [50], num_tail=3)
    world.index(context.path[0].segment)
    return next(run for run in context.decode_runs(0) if run.indexed)


def wait_until_idle(probe: LiveProbe) -> None:
    while probe.is_busy:
        time.sleep(0.001)


def test_an_exact_index_is_measured_as_perfect(world: Any) -> None:
    measured: list[tuple[float, float]] = []
    run = indexed_run(world)
    for layer_idx, kv_head in ((0, 0), (1, 1)):
        probe = LiveProbe(8, world.scale, lambda *quality: measured.append(quality))
        probe.submit(world.randn(16), run, layer_idx, kv_head)
        wait_until_idle(probe)
        probe.close()
        assert not probe.is_busy
    assert measured == [(1.0, 1.0), (1.0, 1.0)]


def test_a_blind_index_is_found_out(world: Any) -> None:
    measured: list[tuple[float, float]] = []
    probe = LiveProbe(4, world.scale, lambda *quality: measured.append(quality))
    run = indexed_run(world)
    ends: list[int] = []

    def search(layer_idx: int, kv_head: int, query: torch.Tensor, k: int, end: int) -> torch.Tensor:
        ends.append(end)
        return torch.empty(0, dtype=torch.int64)

    run.indexed.index = SimpleNamespace(begin=4, search=search)
    probe.submit(world.randn(16), run, 0, 0)
    wait_until_idle(probe)
    probe.close()
    assert measured == [(0.0, 0.0)]
    assert ends == [run.end]


def test_long_checks_are_far_between(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("retrieval.probe.time", SimpleNamespace(monotonic=lambda: clock[0]))
    probe = LiveProbe(4, world.scale, lambda *_: None)
    run = indexed_run(world)

    def search(layer_idx: int, kv_head: int, query: torch.Tensor, k: int, end: int) -> torch.Tensor:
        clock[0] += 0.5
        return torch.empty(0, dtype=torch.int64)

    run.indexed.index = SimpleNamespace(begin=4, search=search)
    assert probe.is_ready
    probe.submit(world.randn(16), run, 0, 0)
    wait_until_idle(probe)
    clock[0] += 49.0
    assert not probe.is_ready
    clock[0] += 1.1
    assert probe.is_ready
    probe.close()


def test_keys_are_widened_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrieval.probe.BLOCK_KEYS", 3)
    assert measure(QUERY, KEYS.bfloat16(), torch.tensor([1, 3]), 2, 1.0).captured_mass == 1.0
    assert measure(QUERY, KEYS, torch.tensor([2]), 1, 1.0).recall == 0.0


def test_the_query_is_copied_before_the_step_goes_on(world: Any) -> None:
    entered, go_on, seen = threading.Event(), threading.Event(), list[torch.Tensor]()
    run = indexed_run(world)

    def search(layer_idx: int, kv_head: int, query: torch.Tensor, k: int, end: int) -> torch.Tensor:
        entered.set()
        assert go_on.wait(30)
        seen.append(query.clone())
        return torch.empty(0, dtype=torch.int64)

    run.indexed.index = SimpleNamespace(begin=4, search=search)
    probe = LiveProbe(4, world.scale, lambda *_: None)
    query = world.randn(16)
    expected = query.clone()
    probe.submit(query, run, 0, 0)
    assert entered.wait(30)
    assert probe.is_busy
    query.zero_()
    go_on.set()
    probe.close()
    assert torch.equal(seen[0], expected)


def test_a_check_that_fails_is_logged_and_harms_nothing(world: Any, caplog: pytest.LogCaptureFixture) -> None:
    measured: list[tuple[float, float]] = []
    probe = LiveProbe(4, world.scale, lambda *quality: measured.append(quality))
    run = indexed_run(world)
    with caplog.at_level(logging.ERROR):
        probe.submit(world.randn(99), run, 0, 0)  # a query of the wrong width
        wait_until_idle(probe)
        probe.submit(world.randn(16), run, 0, 0)
        wait_until_idle(probe)
        probe.close()
    assert caplog.text.count("live recall check failed") == 1
    assert measured == [(1.0, 1.0)]


def test_an_index_that_was_evicted_meanwhile_is_not_measured(world: Any, caplog: pytest.LogCaptureFixture) -> None:
    measured: list[tuple[float, float]] = []
    probe = LiveProbe(4, world.scale, lambda *quality: measured.append(quality))
    run = indexed_run(world)
    run.indexed.index = None
    with caplog.at_level(logging.ERROR):
        probe.submit(world.randn(16), run, 0, 0)
        probe.close()
    assert (measured, caplog.text) == ([], "")
