"""Exact attention of a chunk of a prompt over everything before it, block by block.

On a CPU with tile instructions the core does it in one call; elsewhere torch does, on the queries' device. Keys
and values that live in host memory while the queries are on a GPU are streamed there in blocks, the next
block's copy under way while the present one is attended, so device memory stays bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from retrieval import native
from retrieval.context import Context, Run
from retrieval.geometry import Geometry
from retrieval.merge import Partial, empty_partial, merge
from retrieval.partial_attention import attend_block, attend_grouped, attend_masked

BLOCK_TOKENS = 16384  # of K and V streamed to a device at a time: 64 MiB a layer for 8 KV heads of 128 in bf16
SLIDING_ROWS = 512  # queries whose masked scores are held at once


def attend_chunk(
    queries: Tensor,
    context: Context,
    layer_idx: int,
    scale: float,
    sliding_window: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of the newest `n` tokens, whose K and V were written to the tail but not committed.

    queries `[num_q_heads, n, head_dim]` at positions `num_tokens .. num_tokens + n`; fills and returns `out` of their
    shape, float32 where none is given, else float32 or the queries' dtype, its last dimension dense.
    """
    out = torch.empty(queries.shape, device=queries.device) if out is None else out
    core = usable_core(queries, context)
    if core is not None:
        attend_chunk_native(core, queries, context, layer_idx, scale, sliding_window, out)
    else:
        out.copy_(attend_chunk_torch(queries, context, layer_idx, scale, sliding_window))
    return out


def usable_core(queries: Tensor, context: Context) -> Any | None:
    """The core if it can attend this chunk: all in host memory, bf16 throughout, on a machine that has the tiles."""
    is_fit = queries.device.type == "cpu" and queries.dtype == torch.bfloat16 and queries.shape[-1] % 8 == 0
    buffers = [*(entry.segment.kv for entry in context.path), context.tail]
    if not is_fit or any(kv.keys.device.type != "cpu" or kv.keys.dtype != torch.bfloat16 for kv in buffers):
        return None
    core = native.core()
    return core if core is not None and core.can_attend_chunk() else None


def has_own_threads(geometry: Geometry) -> bool:
    """Whether the core attends the chunks of a model on this CPU, whatever torch's number of threads."""
    core = native.core()
    is_fit = geometry.dtype == geometry.kv_dtype == torch.bfloat16 and geometry.head_dim % 8 == 0
    return is_fit and core is not None and bool(core.can_attend_chunk())


def attend_chunk_native(
    core: Any,
    queries: Tensor,
    context: Context,
    layer_idx: int,
    scale: float,
    sliding_window: int | None,
    out: Tensor,
) -> None:
    """As `attend_chunk`, by the core; the softmax weights are rounded to bf16 as torch's CPU kernel rounds them."""
    n = queries.shape[1]
    runs = context.runs(num_new=n)
    parts = [core.Part(run.kv.keys[layer_idx], run.kv.values[layer_idx], run.begin, run.end) for run in runs]
    rows = queries if queries.stride(-1) == 1 else queries.contiguous()
    core.attend_chunk(rows, parts, n, scale, out, None, sliding_window)


def attend_chunk_torch(
    queries: Tensor, context: Context, layer_idx: int, scale: float, sliding_window: int | None = None
) -> Tensor:
    """As `attend_chunk`, by torch: the twin that the core is held to, and what serves everywhere."""
    if sliding_window is not None and context.num_tokens + queries.shape[1] > sliding_window:
        return _attend_sliding(queries, context, layer_idx, scale, sliding_window)
    partials = [_attend_self(queries, context, layer_idx, scale)]
    for keys, values in _blocks(context.runs(), layer_idx, queries.device):
        partials = [merge([*partials, attend_grouped(queries, keys, values, scale)])]
    return partials[0][0]


def _attend_self(queries: Tensor, context: Context, layer_idx: int, scale: float) -> Partial:
    """The chunk's own triangle."""
    begin, end = context.tail.length, context.tail.length + queries.shape[1]
    group = context.geometry.group_size
    keys = context.tail.read_keys(layer_idx, begin, end)
    values = context.tail.read_values(layer_idx, begin, end)
    keys, values = (t.to(queries.device).repeat_interleave(group, dim=0) for t in (keys, values))
    return attend_block(queries, keys, values, scale, is_causal=True)


def _blocks(runs: list[Run], layer_idx: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """K and V `[num_kv_heads, m, head_dim]` of the runs on `device`, copied one block ahead when elsewhere."""
    ahead: tuple[Tensor, Tensor] | None = None
    for run in runs:
        is_in_place = run.kv.device == device and not run.kv.geometry.is_quantized
        size = run.end - run.begin if is_in_place else BLOCK_TOKENS
        for begin in range(run.begin, run.end, max(1, size)):
            end = min(begin + size, run.end)
            keys, values = run.kv.read_keys(layer_idx, begin, end), run.kv.read_values(layer_idx, begin, end)
            fetched = (keys.to(device, non_blocking=True), values.to(device, non_blocking=True))
            if ahead is not None:
                yield ahead
            ahead = fetched
    if ahead is not None:
        yield ahead


def _attend_sliding(queries: Tensor, context: Context, layer_idx: int, scale: float, window: int) -> Tensor:
    """Each query sees the last `window` positions, itself included; a block of rows at a time."""
    blocks = [
        _attend_sliding_rows(queries[:, row : row + SLIDING_ROWS], context, layer_idx, scale, window, row)
        for row in range(0, queries.shape[1], SLIDING_ROWS)
    ]
    return torch.cat(blocks, dim=1)


def _attend_sliding_rows(
    queries: Tensor, context: Context, layer_idx: int, scale: float, window: int, row: int
) -> Tensor:
    """The chunk's rows from `row` on, at positions `num_tokens + row ..`."""
    past = context.num_tokens + row
    first = max(0, past - window + 1)
    position = torch.arange(past, past + queries.shape[1], device=queries.device)[:, None]
    partials = [empty_partial(tuple(queries.shape), queries.device)]
    offset = 0
    for run in context.runs(num_new=row + queries.shape[1]):
        begin = min(max(run.begin, run.begin + first - offset), run.end)
        if begin < run.end:
            keys = run.kv.read_keys(layer_idx, begin, run.end).to(queries.device)
            values = run.kv.read_values(layer_idx, begin, run.end).to(queries.device)
            start = offset + begin - run.begin
            key_position = torch.arange(start, start + keys.shape[1], device=queries.device)[None]
            mask = (key_position <= position) & (key_position > position - window)
            partials = [merge([*partials, attend_masked(queries, keys, values, scale, mask)])]
        offset += run.end - run.begin
    return partials[0][0]
