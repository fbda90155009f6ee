"""Index builds happen behind decoding: exact before, swapped in at once, and exact for ever when they fail."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from retrieval import index as indexes
from retrieval import native
from retrieval.builder import IndexBuilder
from retrieval.index import IndexInputError, KeyIndex
from retrieval.methods.retrieval import QuerySample
from retrieval.segment_index import CodesMaker

WAIT_SECONDS = 30.0  # only ever waited for in full when a test fails
real_build = indexes.build


class Gate:
    """Stands before every build: counts them, can hold them up, and can make them fail."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()
        self.fails = False
        self.calls: list[tuple[Tensor, Tensor]] = []

    def build(self, kind: str, keys: Tensor, queries: Tensor, **options: Any) -> KeyIndex:
        self.calls.append((keys, queries))
        self.entered.set()
        assert self.open.wait(WAIT_SECONDS)
        if self.fails:
            raise IndexInputError("told to fail")
        return real_build(kind, keys, queries, **options)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate()
    monkeypatch.setattr(indexes, "build", gate.build)
    return gate


@pytest.fixture
def built() -> list[tuple[str, float, int]]:
    """What the builder reported."""
    return []


@pytest.fixture
def builder(built: list[tuple[str, float, int]]) -> Iterator[IndexBuilder]:
    builder = IndexBuilder("flat", {}, num_sink_tokens=4, on_built=lambda *facts: built.append(facts))
    yield builder
    builder.close()


def test_every_layer_and_head_is_indexed_behind_the_sink(world: Any, builder: IndexBuilder, built: Any) -> None:
    context = world.context([30, 20])
    first, second = (e.segment for e in context.path)
    builder.submit(first, None)
    builder.submit(second, None)
    builder.wait()
    assert (first.index.begin, second.index.begin) == (4, 0)
    for layer_idx in range(2):
        for kv_head in range(2):
            keys = first.index.head(layer_idx, kv_head).keys
            assert torch.equal(keys, first.kv.keys[layer_idx, kv_head, 4:30])
            assert keys.data_ptr() == first.kv.keys[layer_idx, kv_head, 4].data_ptr(), "keys are not copied"
    assert (first.index_state, second.index_state) == ("ready", "ready")
    assert [(kind, num_keys) for kind, _, num_keys in built] == [("flat", 30), ("flat", 20)]


def test_keys_that_only_an_index_needs_are_counted(make_world: Any, make_geometry: Any) -> None:
    geometry = replace(make_geometry(dtype=torch.bfloat16), is_quantized=True)
    segment = make_world(geometry=geometry).context([50]).path[0].segment
    builder = IndexBuilder("flat", {}, num_sink_tokens=0, on_built=lambda *_: None)
    builder.submit(segment, None)
    builder.wait()
    builder.close()
    expected = 50 * geometry.num_layers * geometry.num_kv_heads * geometry.head_dim * 2
    assert segment.index.nbytes == builder.most_bytes(geometry, 50) == expected


@pytest.mark.parametrize("kind", ["ivf", "codes"])
def test_an_index_takes_no_more_bytes_than_foretold(world: Any, kind: str) -> None:
    core = native.core() if kind == "codes" else None
    if kind == "codes" and core is None:
        pytest.skip("needs the C++ core")
    segment = world.context([3000]).path[0].segment
    codes, options = (CodesMaker(core, core.Budget()), {}) if core is not None else (None, {"num_lists": 20})
    builder = IndexBuilder(kind, options, num_sink_tokens=4, on_built=lambda *_: None, codes=codes)
    builder.submit(segment, None)
    builder.wait()
    builder.close()
    most = builder.most_bytes(world.geometry, 3000, was_decoded=True)
    assert 0.4 * most <= segment.index.nbytes <= most <= builder.most_bytes(world.geometry, 3000)


def test_a_segment_shorter_than_the_sink_gets_an_index_of_nothing(world: Any, builder: IndexBuilder) -> None:
    context = world.context([3, 20], num_tail=20)
    for entry in context.path:
        builder.submit(entry.segment, None)
    builder.wait()
    covered = [(r.end - r.begin, r.indexed is not None) for r in context.decode_runs(0)]
    assert covered == [(3, False), (1, False), (19, True), (20, False)]


def test_decoding_is_exact_until_the_index_is_swapped_in(
    world: Any, builder: IndexBuilder, gate: Gate, decode: Any
) -> None:
    context = world.context([40], num_tail=3)
    world.extend(context.tail, 1, commit=False)
    queries, segment = world.randn(4, 16), context.path[0].segment
    gate.open.clear()
    builder.submit(segment, None)
    assert gate.entered.wait(WAIT_SECONDS)
    assert segment.index_state == "building"
    during = context.decode_runs(1)
    assert all(run.indexed is None for run in during)
    exact = decode(queries, context, during, 0, 5)
    gate.open.set()
    builder.wait()
    after = context.decode_runs(1)
    assert sum(run.indexed is segment for run in after) == 1
    everything = decode(queries, context, after, 0, 40)
    torch.testing.assert_close(everything, exact, atol=1e-5, rtol=1e-5)  # float32 sums in another order
    assert not torch.allclose(decode(queries, context, after, 0, 1), exact, atol=1e-3)


def test_runs_chosen_before_the_swap_stay_exact(world: Any, builder: IndexBuilder) -> None:
    context = world.context([40], num_tail=3)
    runs = context.decode_runs(0)
    builder.submit(context.path[0].segment, None)
    builder.wait()
    assert all(run.indexed is None for run in runs)


def test_a_segment_is_built_once(world: Any, builder: IndexBuilder, gate: Gate, built: Any) -> None:
    segment = world.context([30]).path[0].segment
    for _ in range(3):
        builder.submit(segment, None)
    builder.wait()
    builder.submit(segment, None)
    builder.wait()
    assert (len(built), len(gate.calls)) == (1, 4)


def test_a_failed_build_leaves_the_segment_exact_and_the_builder_alive(
    world: Any, builder: IndexBuilder, gate: Gate, built: Any, caplog: pytest.LogCaptureFixture
) -> None:
    context = world.context([30, 20])
    first, second = (e.segment for e in context.path)
    gate.fails = True
    with caplog.at_level(logging.ERROR):
        builder.submit(first, None)
        builder.wait()
    assert (first.index_state, first.index, first.index_bytes, built) == ("failed", None, 0, [])
    assert "stays exact" in caplog.text
    gate.fails = False
    builder.submit(first, None)
    builder.submit(second, None)
    builder.wait()
    assert (first.index_state, second.index_state) == ("failed", "ready")
    assert [r.indexed for r in context.decode_runs(0) if r.indexed] == [second]


def test_close_ends_the_build_under_way_and_drops_what_is_queued(
    world: Any, builder: IndexBuilder, gate: Gate, built: Any
) -> None:
    segments = [e.segment for e in world.context([30, 20, 20]).path]
    gate.open.clear()
    for segment in segments:
        builder.submit(segment, None)
    assert gate.entered.wait(WAIT_SECONDS)
    closing = threading.Thread(target=builder.close)
    closing.start()
    assert builder._closed.wait(WAIT_SECONDS)
    gate.open.set()
    closing.join(WAIT_SECONDS)
    assert not closing.is_alive()
    assert len(gate.calls) == 1, "no head is begun after close"
    assert [s.index for s in segments] == [None, None, None]
    assert [s.index_state for s in segments] == ["none", "none", "none"], "nobody waits for a dropped build"
    assert built == []


def test_sampled_queries_reach_their_own_head(world: Any, builder: IndexBuilder, gate: Gate) -> None:
    segment = world.context([30]).path[0].segment
    chunks = [[world.randn(2, 3, 16), world.randn(2, 1, 16)] for _ in range(2)]
    builder.submit(segment, QuerySample(chunks))
    builder.wait()
    for call, (layer_idx, kv_head) in zip(gate.calls, [(0, 0), (0, 1), (1, 0), (1, 1)], strict=True):
        assert torch.equal(call[1], torch.cat([chunk[kv_head] for chunk in chunks[layer_idx]]))


def test_without_a_sample_an_index_gets_no_queries(world: Any, builder: IndexBuilder, gate: Gate) -> None:
    builder.submit(world.context([30]).path[0].segment, None)
    builder.wait()
    assert {tuple(queries.shape) for _, queries in gate.calls} == {(0, 16)}
