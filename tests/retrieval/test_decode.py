"""Decode attention over exact and indexed runs, against plain attention over the same keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from retrieval.context import Context
from retrieval.decode import DecodeRow, DecodeStats, NativeDecoder
from retrieval.segment_index import CodesMaker

# of outputs of about 1, against float64. bf16 and fp16: each exact run's output is rounded once by its kernel
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
EVERYTHING = 10_000


def context_with_indexes(world: Any) -> Context:
    """Two indexed segments, the second seen in part, one without an index, a tail whose last token is new."""
    context: Context = world.context([60, 40, 20], [60, 33, 20], num_tail=5)
    for entry in context.path[:2]:
        world.index(entry.segment)
    world.extend(context.tail, 1, commit=False)
    return context


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("heads", [(4, 2), (6, 1), (3, 3)], ids=str)
def test_retrieving_everything_equals_full_attention(
    make_world: Any, make_geometry: Any, oracle: Any, decode: Any, dtype: torch.dtype, heads: tuple[int, int]
) -> None:
    world = make_world(make_geometry(num_q_heads=heads[0], num_kv_heads=heads[1], dtype=dtype))
    context = context_with_indexes(world)
    queries = world.randn(heads[0], 16)
    runs = context.decode_runs(1)
    assert sum(r.indexed is not None for r in runs) == 2
    for layer_idx in range(2):
        out = decode(queries, context, runs, layer_idx, EVERYTHING)
        expected = oracle(queries[:, None], *world.all_kv(context, layer_idx, 1), world.scale)[:, 0]
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, expected, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])
        exact = decode(queries, context, context.runs(1), layer_idx, 0)
        torch.testing.assert_close(out, exact, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@pytest.mark.parametrize("num_retrieved", [1, 3, 20])
def test_each_head_gets_its_own_best_keys_of_each_segment(
    world: Any, oracle: Any, decode: Any, num_retrieved: int
) -> None:
    context = context_with_indexes(world)
    queries = 3 * world.randn(4, 16)
    keys, values = world.all_kv(context, 1, 1)
    scores = torch.einsum("hd,hmd->hm", queries, keys.repeat_interleave(2, 0))
    mask = torch.ones(4, keys.shape[1], dtype=torch.bool)
    for begin, end in ((4, 60), (60, 93)):  # behind the sink; the second segment up to its limit
        mask[:, begin:end] = False
        mask.scatter_(1, begin + scores[:, begin:end].topk(num_retrieved, dim=1).indices, True)
    out = decode(queries, context, context.decode_runs(1), 1, num_retrieved)
    expected = oracle(queries[:, None], keys, values, world.scale, mask[:, None])[:, 0]
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_stats_count_visible_and_scored_keys_per_query_head(world: Any, decode: Any) -> None:
    context = context_with_indexes(world)
    stats = DecodeStats()
    decode(world.randn(4, 16), context, context.decode_runs(1), 0, 10, stats)
    num_exact = 4 + 20 + 6  # sink, the segment without an index, the tail with the new token
    assert stats.num_visible == 4 * (num_exact + 56 + 33)
    assert stats.num_scored == 4 * (num_exact + 56 + 33)  # flat scores all it may see


def test_retrieving_nothing_leaves_the_static_set(world: Any, oracle: Any, decode: Any) -> None:
    context = context_with_indexes(world)
    queries = world.randn(4, 16)
    out = decode(queries, context, context.decode_runs(1), 0, 0)
    keys, values = world.all_kv(context, 0, 1)
    static = [*range(4), *range(93, keys.shape[1])]
    expected = oracle(queries[:, None], keys[:, static], values[:, static], world.scale)[:, 0]
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_a_lone_token_attends_to_itself(world: Any, decode: Any) -> None:
    context = world.context()
    world.extend(context.tail, 1, commit=False)
    out = decode(world.randn(4, 16), context, context.decode_runs(1), 0, 10)
    torch.testing.assert_close(out, context.tail.values[0, :, 0].repeat_interleave(2, 0), atol=1e-6, rtol=1e-6)


def test_no_run_at_all_gives_zeros(world: Any, decode: Any) -> None:
    out = decode(world.randn(4, 16), world.context(), [], 0, 10)
    assert torch.equal(out, torch.zeros(4, 16))


def test_a_decoder_takes_what_its_callers_tensors_hold_by_now(world: Any, decode: Any) -> None:
    core = pytest.importorskip("retrieval._core")
    context = context_with_indexes(world)
    decoder = NativeDecoder(EVERYTHING, core, core.Budget(k=EVERYTHING))
    runs, out = context.decode_runs(1), torch.empty(1, 4, 16)
    same, strided = torch.empty(1, 4, 16), torch.empty(1, 4, 32)[..., :16]

    def attend(queries: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        return decoder.attend(queries, [DecodeRow(context, runs)], 0, world.scale, DecodeStats(), out)

    for queries in (same, strided, same.clone()):
        for _ in range(2):
            queries.copy_(world.randn(1, 4, 16))
            expected = decode(queries[0], context, runs, 0, EVERYTHING)
            torch.testing.assert_close(attend(queries, out)[0], expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(out[0], expected, atol=1e-5, rtol=1e-5)
        fresh = attend(queries, None)
        assert fresh is not out
        torch.testing.assert_close(fresh[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("exact_keys", "num_parts"), [(92, 3), (91, 5)])  # 56 and 35 keys are searched
def test_where_few_keys_are_searched_buffers_are_attended_whole(
    world: Any, oracle: Any, exact_keys: int, num_parts: int
) -> None:
    core = pytest.importorskip("retrieval._core")
    maker = CodesMaker(core, core.Budget(exact_keys=exact_keys))
    context: Context = world.context([60, 40], num_tail=2)
    for entry, begin in zip(context.path, (4, 0), strict=True):
        kv = entry.segment.kv
        entry.segment.index = maker.index(begin, [maker.encode(kv, layer, kv.length) for layer in range(2)], kv)
    world.extend(context.tail, 1, commit=False)
    queries, decoder = world.randn(4, 16), NativeDecoder(0, core, maker.budget)
    for layer_idx in range(2):
        row = DecodeRow(context, context.decode_runs(1))
        out = decoder.attend(queries[None], [row], layer_idx, world.scale, DecodeStats())[0]
        expected = oracle(queries[:, None], *world.all_kv(context, layer_idx, 1), world.scale)[:, 0]
        torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-3)
        assert len(context.decode_cache.layers[layer_idx]) == num_parts
