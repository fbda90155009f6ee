"""Attention of one decode token per sequence over its selected runs, merged exactly in float32.

Exact runs go through one block kernel each; an indexed run through its segment's index per KV head.
Runs on a device are attended there; host runs on the CPU, and only `(out, lse)` travel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from retrieval.context import Run
from retrieval.merge import Partial, empty_partial, merge
from retrieval.partial_attention import attend_grouped


@dataclass(slots=True)
class DecodeStats:
    """Counts over (sequence, layer, query head): keys visible, scored exactly, retrieved into the output."""

    num_visible: int = 0
    num_scored: int = 0
    num_retrieved: int = 0

    def add(self, visible: int, scored: int, retrieved: int) -> None:
        """Count one run."""
        self.num_visible += visible
        self.num_scored += scored
        self.num_retrieved += retrieved


def attend_decode(
    queries: Tensor, runs: list[Run], layer_idx: int, scale: float, num_retrieved: int, stats: DecodeStats
) -> Tensor:
    """queries `[num_q_heads, head_dim]` of one sequence; returns float32 `[num_q_heads, head_dim]`."""
    partials = [empty_partial(tuple(queries.shape), queries.device)]
    for run in runs:
        if run.indexed is None:
            partials.append(_attend_exact(queries, run, layer_idx, scale))
            count = (run.end - run.begin) * queries.shape[0]
            stats.add(count, count, count)
        else:
            partials.append(_attend_indexed(queries, run, layer_idx, scale, num_retrieved, stats))
    return merge(partials)[0]


def _attend_exact(queries: Tensor, run: Run, layer_idx: int, scale: float) -> Partial:
    keys = run.kv.keys[layer_idx, :, run.begin : run.end]
    values = run.kv.values[layer_idx, :, run.begin : run.end]
    local = queries.to(device=keys.device, dtype=keys.dtype)
    out, lse = attend_grouped(local[:, None], keys, values, scale)
    return out[:, 0].to(queries.device), lse[:, 0].to(queries.device)


def _attend_indexed(
    queries: Tensor, run: Run, layer_idx: int, scale: float, num_retrieved: int, stats: DecodeStats
) -> Partial:
    """Search the segment's index of each KV head up to the run's end."""
    assert run.indexed is not None
    index = run.indexed.index
    values = run.kv.values[layer_idx]
    grouped = queries.to("cpu").reshape(values.shape[0], -1, values.shape[-1])  # [num_kv_heads, group, d]
    limit = run.end - index.begin
    outs, lses = [], []
    for kv_head, head_index in enumerate(index.layers[layer_idx]):
        head_values = values[kv_head, index.begin :]
        out, lse, cost = head_index.attend(grouped[kv_head], head_values, num_retrieved, scale, limit)
        stats.add(cost.num_keys * cost.num_queries, cost.num_scored, cost.num_retrieved)
        outs.append(out)
        lses.append(lse)
    device = queries.device
    return torch.cat(outs).to(device), torch.cat(lses).to(device)
