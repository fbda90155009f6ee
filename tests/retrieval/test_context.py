"""A context's sets are disjoint and complete; opening, sealing, forking and closing keep the references right."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.context import Context, Run, StaticSet, open_context
from retrieval.geometry import Geometry
from retrieval.kv_buffer import KvBuffer
from retrieval.segment_index import HeadIndexes
from retrieval.segments import PathEntry, SegmentStore

CPU = torch.device("cpu")
TINY = Geometry(1, 1, 1, 1, torch.float32, (None,))
PART = st.tuples(st.integers(1, 9), st.integers(1, 9), st.booleans())  # tokens, tokens seen, has an index


def tiny_context(parts: list[tuple[int, int, bool]], num_tail: int, static: StaticSet) -> Context:
    """A path of segments with indexes over everything behind the sink (of no keys: only positions matter here)."""
    store, path = SegmentStore(), list[PathEntry]()
    for i, (num_tokens, limit, is_indexed) in enumerate(parts):
        kv = KvBuffer(TINY, num_tokens, CPU)
        kv.commit(num_tokens)
        tokens = np.full(num_tokens, i, dtype=np.int32)
        segment = store.add("", path[-1] if path else None, tokens, kv)
        if is_indexed:
            segment.index = HeadIndexes(max(0, static.num_sink_tokens - segment.start), [])
        path.append(PathEntry(segment, min(limit, num_tokens)))
    tail = KvBuffer(TINY, num_tail + 1, CPU)
    tail.commit(num_tail)
    return Context(TINY, static, store, tuple(path), tail, "", CPU)


def positions_of(context: Context, run: Run) -> list[int]:
    starts = {id(e.segment.kv): e.segment.start for e in context.path} | {id(context.tail): context.tail_start}
    return [starts[id(run.kv)] + offset for offset in range(run.begin, run.end)]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    parts=st.lists(PART, max_size=4),
    num_tail=st.integers(0, 9),
    num_new=st.integers(0, 1),
    num_sink=st.integers(0, 12),
    window=st.integers(0, 20),
)
def test_static_and_retrieved_sets_cover_every_position_exactly_once(
    parts: list[tuple[int, int, bool]], num_tail: int, num_new: int, num_sink: int, window: int
) -> None:
    context = tiny_context(parts, num_tail, StaticSet(num_sink, window, 16))
    length = context.num_tokens + num_new
    seen = Counter[int]()
    for run in context.decode_runs(num_new):
        positions = positions_of(context, run)
        seen.update(positions)
        if run.indexed is not None:
            assert run.begin == run.indexed.index.begin, "an index is searched from its first key on"
            assert num_sink <= positions[0] <= positions[-1] < length - window
    assert seen == Counter(range(length))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(parts=st.lists(PART, max_size=4), num_tail=st.integers(0, 9))
def test_runs_are_all_positions_in_order(parts: list[tuple[int, int, bool]], num_tail: int) -> None:
    context = tiny_context(parts, num_tail, StaticSet(3, 5, 16))
    listed = [p for run in context.runs(num_new=1) for p in positions_of(context, run)]
    assert listed == list(range(context.num_tokens + 1))
    assert all(run.indexed is None for run in context.runs())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(parts=st.lists(PART, min_size=1, max_size=4), window=st.integers(0, 20))
def test_everything_between_sink_and_window_is_retrieved_where_there_is_an_index(
    parts: list[tuple[int, int, bool]], window: int
) -> None:
    context = tiny_context([(n, limit, True) for n, limit, _ in parts], 3, StaticSet(4, window, 16))
    retrieved = [p for r in context.decode_runs(1) if r.indexed for p in positions_of(context, r)]
    assert retrieved == list(range(4, min(context.num_tokens + 1 - window, context.tail_start)))


def open_for(world: Any, tokens: Any, **options: Any) -> Context:
    settings_ = {"salt": "", "capacity": len(tokens) + 50, "device": CPU} | options
    return open_context(world.geometry, world.static, world.store, tokens, **settings_)


def sealed(world: Any, *lengths: int) -> tuple[Any, list[Any]]:
    """Segments of these lengths in a path, left idle; all their tokens."""
    context = world.context()
    tokens = world.tokens(sum(lengths))
    for length in lengths:
        world.extend(context.tail, length)
        context.seal(tokens)
    segments = [e.segment for e in context.path]
    context.close()
    return tokens, segments


def test_open_shares_long_segments(world: Any) -> None:
    tokens, (first, second) = sealed(world, 20, 16)
    context = open_for(world, np.append(tokens, [5, 6]).astype(np.int32))
    assert [(e.segment, e.limit) for e in context.path] == [(first, 20), (second, 16)]
    assert (context.num_tokens, context.tail.length, context.tail_start) == (36, 0, 36)
    assert (first.num_references, second.num_references) == (2, 1)  # the child holds its parent too
    assert (first.num_hits, second.num_hits) == (1, 1)


def test_open_copies_a_short_rest_into_the_tail(world: Any) -> None:
    tokens, (first, second) = sealed(world, 20, 9)
    context = open_for(world, np.append(tokens, [5]).astype(np.int32))
    assert [(e.segment, e.limit) for e in context.path] == [(first, 20)]
    assert (context.num_tokens, context.tail.length) == (29, 9)
    assert torch.equal(context.tail.keys[:, :, :9], second.kv.keys[:, :, :9])
    assert torch.equal(context.tail.values[:, :, :9], second.kv.values[:, :, :9])
    assert second.num_references == 0


def test_open_copies_when_the_prompt_leaves_a_segment_early(world: Any) -> None:
    tokens, (first,) = sealed(world, 40)
    near = tokens[:12].copy()
    context = open_for(world, np.append(near, [1001]).astype(np.int32))
    assert (context.path, context.num_tokens) == ((), 12)
    assert torch.equal(context.tail.keys[:, :, :12], first.kv.keys[:, :, :12])
    far = open_for(world, np.append(tokens[:30], [1001]).astype(np.int32))
    assert [(e.segment, e.limit) for e in far.path] == [(first, 30)]


def test_open_leaves_the_last_token_to_compute(world: Any) -> None:
    tokens, (first,) = sealed(world, 20)
    context = open_for(world, tokens)
    assert context.num_tokens == 19
    assert [(e.segment, e.limit) for e in context.path] == [(first, 19)]
    assert open_for(world, tokens[:1]).num_tokens == 0


def test_open_reuses_nothing_when_told_so_or_under_another_salt(world: Any) -> None:
    tokens, (first,) = sealed(world, 20)
    assert open_for(world, tokens, reuse=False).num_tokens == 0
    assert open_for(world, tokens, salt="other").num_tokens == 0
    assert first.num_hits == 0


def test_open_makes_room_for_all_tokens_at_once(world: Any) -> None:
    tokens, _ = sealed(world, 20)
    context = open_for(world, np.append(tokens, [5]).astype(np.int32), capacity=100)
    address = context.tail.keys.data_ptr()
    world.extend(context.tail, 80)
    assert context.tail.keys.data_ptr() == address


def test_seal_turns_the_tail_into_a_segment_and_keeps_its_newest_tokens(world: Any) -> None:
    context = world.context(num_tail=30)
    keys, values = (t.clone() for t in world.all_kv(context, 1))
    tokens = world.tokens(31)  # one sampled token that was not computed yet
    segment = context.seal(tokens, num_kept=8)
    assert (segment.start, segment.num_tokens, segment.num_references) == (0, 22, 1)
    assert segment.token_ids.tolist() == tokens[:22].tolist()
    assert (context.num_tokens, context.tail.length, context.tail_start) == (30, 8, 22)
    assert torch.equal(world.all_kv(context, 1)[0], keys)
    assert torch.equal(world.all_kv(context, 1)[1], values)
    assert segment.kv_bytes + context.tail_bytes == 30 * world.geometry.kv_bytes_per_token
    world.extend(context.tail, 10)
    second = context.seal(world.tokens(40))
    assert (second.start, second.end, second.parent, context.tail.length) == (22, 40, segment, 0)


def test_sealing_the_same_content_twice_holds_it_once(world: Any) -> None:
    tokens = world.tokens(20)
    first, second = world.context(num_tail=20), world.context(num_tail=20)
    segment = first.seal(tokens)
    assert second.seal(tokens) is segment
    assert (len(world.store), segment.num_references) == (1, 2)
    assert second.runs()[0].kv is segment.kv
    first.close()
    second.close()
    assert segment.num_references == 0


def test_a_sealed_segment_does_not_change_when_its_context_goes_on(world: Any) -> None:
    context = world.context(num_tail=20)
    segment = context.seal(world.tokens(20), num_kept=4)
    keys = segment.kv.keys[:, :, :16].clone()
    world.extend(context.tail, 300)
    assert torch.equal(segment.kv.keys[:, :, :16], keys)
    assert segment.kv.length == segment.num_tokens


def test_fork_shares_segments_and_copies_the_tail(world: Any) -> None:
    context = world.context([20], num_tail=5)
    context.method_state = object()
    twin = context.fork()
    segment = context.path[0].segment
    assert (twin.path, segment.num_references, twin.num_tokens) == (context.path, 2, 25)
    assert twin.method_state is context.method_state
    before = world.all_kv(context, 0)[0].clone()
    world.extend(twin.tail, 3)
    assert torch.equal(world.all_kv(context, 0)[0], before)
    assert torch.equal(world.all_kv(twin, 0)[0][:, :25], before)


def test_close_lets_everything_go_once(world: Any) -> None:
    context = world.context([20, 16], num_tail=5)
    segments = [e.segment for e in context.path]
    context.close()
    context.close()
    assert [s.num_references for s in segments] == [1, 0]
    assert (context.num_tokens, context.tail_bytes) == (0, 0)


@pytest.mark.parametrize("num_kept", [0, 7])
def test_sealing_changes_no_position_seen(world: Any, num_kept: int) -> None:
    world.static = replace(world.static, num_sink_tokens=2, window_size=7)
    context = world.context([20], num_tail=15)
    before = torch.cat([r.kv.keys[0, 0, r.begin : r.end] for r in context.decode_runs(0)])
    context.seal(world.tokens(35), num_kept=num_kept)
    after = torch.cat([r.kv.keys[0, 0, r.begin : r.end] for r in context.decode_runs(0)])
    assert torch.equal(before, after)
