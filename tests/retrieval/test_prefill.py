"""Chunked prefill equals plain causal attention over the whole prompt, whatever the chunks and the storage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from retrieval import prefill
from retrieval.context import Context
from retrieval.prefill import attend_chunk

# of outputs of about 1, against float64: rounding of the stored K and V is in both, that of P and the output in ours
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
LENGTH = 75


def prefill_in_chunks(
    world: Any,
    context: Context,
    queries: Tensor,
    sizes: list[int],
    seal_at: tuple[int, ...] = (),
    window: int | None = None,
) -> Tensor:
    """Layer 1's output for all queries `[num_q_heads, LENGTH, d]`, computed chunk by chunk."""
    outs, begin, tokens = [], 0, world.tokens(LENGTH)
    for size in sizes:
        world.extend(context.tail, size, commit=False)
        outs.append(attend_chunk(queries[:, begin : begin + size], context, 1, world.scale, window))
        context.tail.commit(size)
        begin += size
        if begin in seal_at:
            context.seal(tokens)
    return torch.cat(outs, dim=1)


def visible(num_tokens: int, window: int | None = None) -> Tensor:
    """Which key (column) each query (row) sees."""
    mask = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    return mask if window is None else mask & torch.ones_like(mask).triu(1 - window)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("sizes", [[75], [1] * 10 + [65], [16, 16, 16, 16, 11], [74, 1], [1, 74]], ids=str)
@pytest.mark.parametrize("heads", [(4, 2), (6, 1), (3, 3)], ids=str)
def test_any_chunking_equals_one_causal_pass(
    make_world: Any, make_geometry: Any, oracle: Any, dtype: torch.dtype, sizes: list[int], heads: tuple[int, int]
) -> None:
    world = make_world(make_geometry(num_q_heads=heads[0], num_kv_heads=heads[1], dtype=dtype))
    context, queries = world.context(), world.randn(heads[0], LENGTH, 16)
    out = prefill_in_chunks(world, context, queries, sizes)
    expected = oracle(queries, *world.all_kv(context, 1), world.scale, visible(LENGTH))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@pytest.mark.parametrize("window", [None, 1, 7, 30, 74, 75, 200])
def test_a_path_of_segments_and_a_tail_is_one_prompt(world: Any, oracle: Any, window: int | None) -> None:
    context, queries = world.context(), world.randn(4, LENGTH, 16)
    out = prefill_in_chunks(world, context, queries, [20, 17, 3, 25, 10], seal_at=(20, 40), window=window)
    assert [e.segment.num_tokens for e in context.path] == [20, 20]
    expected = oracle(queries, *world.all_kv(context, 1), world.scale, visible(LENGTH, window))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 12])
def test_tokens_of_a_segment_behind_the_limit_are_not_seen(world: Any, oracle: Any, window: int | None) -> None:
    context = world.context([20, 16], [11, 16], num_tail=5)
    past, n = context.num_tokens, 6
    queries = world.randn(4, n, 16)
    world.extend(context.tail, n, commit=False)
    out = attend_chunk(queries, context, 0, world.scale, window)
    mask = visible(past + n, window)[past:]
    expected = oracle(queries, *world.all_kv(context, 0, num_new=n), world.scale, mask)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_sliding_window_in_every_dtype(make_world: Any, make_geometry: Any, oracle: Any, dtype: torch.dtype) -> None:
    world = make_world(make_geometry(dtype=dtype))
    context, queries = world.context(), world.randn(4, LENGTH, 16)
    out = prefill_in_chunks(world, context, queries, [40, 35], window=20)
    expected = oracle(queries, *world.all_kv(context, 1), world.scale, visible(LENGTH, 20))
    torch.testing.assert_close(out, expected, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@pytest.mark.parametrize("block_tokens", [1, 7, 16, 1000])
def test_runs_elsewhere_come_in_blocks_of_bounded_size(
    world: Any, monkeypatch: pytest.MonkeyPatch, block_tokens: int
) -> None:
    monkeypatch.setattr(prefill, "BLOCK_TOKENS", block_tokens)
    context = world.context([20, 16], [11, 16], num_tail=5)
    elsewhere = torch.device("cpu", 0)  # compares unequal to the buffers' "cpu"
    blocks = list(prefill._blocks(context.runs(), 1, elsewhere))
    assert max(keys.shape[1] for keys, _ in blocks) <= block_tokens
    expected_keys, expected_values = world.all_kv(context, 1)
    assert torch.equal(torch.cat([keys for keys, _ in blocks], dim=1), expected_keys)
    assert torch.equal(torch.cat([values for _, values in blocks], dim=1), expected_values)


def test_runs_on_the_device_are_not_cut(world: Any) -> None:
    context = world.context([20], num_tail=5)
    blocks = list(prefill._blocks(context.runs(), 0, torch.device("cpu")))
    assert [keys.shape[1] for keys, _ in blocks] == [20, 5]
    assert blocks[0][0].data_ptr() == context.path[0].segment.kv.keys[0].data_ptr(), "nothing is copied"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_goes_where_the_caller_wants_it(make_world: Any, make_geometry: Any, dtype: torch.dtype) -> None:
    world = make_world(make_geometry(dtype=dtype))
    context, queries = world.context([20], [20], num_tail=5), world.randn(4, 6, 16)
    world.extend(context.tail, 6, commit=False)
    out = torch.empty(6, 4, 16, dtype=dtype).transpose(0, 1)
    assert attend_chunk(queries, context, 0, world.scale, None, out) is out
    assert torch.equal(out, attend_chunk(queries, context, 0, world.scale).to(dtype))
