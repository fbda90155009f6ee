"""RetrievalAttention (arXiv 2409.10516): sink and window exactly, the rest through an index over its keys.

Deviations: one index per KV head shared by its query heads; segments without an index yet are attended exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from retrieval.context import Context, Run
from retrieval.methods.base import AttentionMethod


@dataclass(slots=True)
class QuerySample:
    """Prefill queries for attention-aware indexes, per layer a list of `[num_kv_heads, m, head_dim]`."""

    layers: list[list[Tensor]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(chunk.nbytes for chunks in self.layers for chunk in chunks)

    def queries(self, layer_idx: int, kv_head: int, head_dim: int) -> Tensor:
        """`[num_queries, head_dim]` of one layer and KV head."""
        chunks = self.layers[layer_idx] if self.layers else []
        return torch.cat([c[kv_head] for c in chunks]) if chunks else torch.empty(0, head_dim)


class RetrievalAttention(AttentionMethod):
    """Sink, window and the retrieved set."""

    name = "retrieval"
    uses_index = True

    def __init__(self, num_index_queries: int = 0) -> None:
        self._num_index_queries = num_index_queries  # per layer and KV head; 0: the index kind needs none

    def select(self, context: Context) -> list[Run]:
        """Every position once; indexed runs are searched, the others exact."""
        return context.decode_runs(num_new=1)

    def observe(self, context: Context, layer_idx: int, queries: Tensor) -> None:
        """Keep every stride-th position's queries, so that a whole prompt gives about `num_index_queries`."""
        if not self._num_index_queries:
            return
        if context.query_sample is None:
            context.query_sample = QuerySample([[] for _ in range(context.geometry.num_layers)])
        geometry = context.geometry
        expected = (context.num_expected_tokens - context.tail_start) * geometry.group_size
        stride = max(1, expected // self._num_index_queries)
        rows = queries[:, -context.num_tokens % stride :: stride]  # [num_q_heads, m, d] at multiples of the stride
        sample = rows.reshape(geometry.num_kv_heads, -1, geometry.head_dim).to("cpu", copy=True)
        context.query_sample.layers[layer_idx].append(sample)
