"""SnapKV (arXiv 2404.14469): the prompt's last queries vote once for the keys that all later tokens may see.

The K and V left out stay in their segments for later requests; only this context's decoding forgets them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from retrieval.context import Context, Run
from retrieval.kv_buffer import KvBuffer
from retrieval.methods.base import AttentionMethod, clip_runs


@dataclass(slots=True)
class SnapState:
    """Observed queries per layer `[num_q_heads, <= num_observed, d]` and, after prefill, the kept K and V."""

    queries: list[Tensor | None]
    kept: KvBuffer | None = None
    first_seen: int = 0  # absolute position from which everything is attended

    @property
    def nbytes(self) -> int:
        """Bytes of queries and kept K and V."""
        kept = 0 if self.kept is None else self.kept.nbytes
        return kept + sum(queries.nbytes for queries in self.queries if queries is not None)


class SnapKvAttention(AttentionMethod):
    """Keys chosen by pooled attention of the observation window (section 4, eqs. 3 to 5), then all newer ones."""

    name = "snapkv"

    def __init__(self, num_kept: int, num_observed: int = 32, pool_size: int = 7) -> None:
        self._num_kept, self._num_observed, self._pool_size = num_kept, num_observed, pool_size

    def select(self, context: Context) -> list[Run]:
        """The kept keys and everything since the observation window."""
        state = context.method_state
        runs = context.runs(num_new=1)
        if state is None or state.kept is None:
            return runs
        return [Run(state.kept, 0, state.kept.length), *clip_runs(runs, state.first_seen)]

    def observe(self, context: Context, layer_idx: int, queries: Tensor) -> None:
        """Keep the newest `num_observed` queries."""
        if context.method_state is None:
            context.method_state = SnapState([None] * context.geometry.num_layers)
        state, known = context.method_state, context.method_state.queries[layer_idx]
        newest = queries if known is None else torch.cat([known, queries], dim=1)
        state.queries[layer_idx] = newest[:, -self._num_observed :].clone()

    def prefill_done(self, context: Context, scale: float) -> None:
        """Choose the kept keys of every layer and KV head."""
        state = context.method_state
        first_seen = context.num_tokens - context.static.window_size
        if state is None or first_seen <= self._num_kept:
            return
        kept = KvBuffer(context.geometry, self._num_kept, context.device)
        kept.reserve(self._num_kept)
        for layer_idx in range(context.geometry.num_layers):
            kept.write(layer_idx, *self._choose(context, layer_idx, state.queries[layer_idx], first_seen, scale))
        kept.commit(self._num_kept)
        context.method_state = SnapState(state.queries, kept, first_seen)

    def _choose(
        self, context: Context, layer_idx: int, queries: Tensor, first_seen: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        """K and V `[num_kv_heads, num_kept, head_dim]` of the best pooled votes among earlier positions."""
        geometry = context.geometry
        runs = context.runs()
        keys = torch.cat([r.kv.read_keys(layer_idx, r.begin, r.end).to(queries.device) for r in runs], dim=1)
        values = torch.cat([r.kv.read_values(layer_idx, r.begin, r.end).to(queries.device) for r in runs], dim=1)
        grouped = queries.reshape(geometry.num_kv_heads, -1, geometry.head_dim)
        scores = (grouped @ keys[:, :first_seen].transpose(1, 2)).float() * scale
        votes = torch.softmax(scores, dim=-1).sum(dim=1, keepdim=True)  # [num_kv_heads, 1, first_seen]
        pooled = functional.max_pool1d(votes, self._pool_size, stride=1, padding=self._pool_size // 2)
        chosen = pooled[:, 0].topk(self._num_kept).indices.sort().values  # [num_kv_heads, num_kept]
        chosen = chosen[..., None].expand(-1, -1, geometry.head_dim)
        return keys.gather(1, chosen), values.gather(1, chosen)
