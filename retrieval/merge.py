"""Exact merge of partial attention results over disjoint key sets, in float32.

A partial result is `(out, lse)`: `out [..., head_dim]` the softmax-weighted mean of the part's values,
`lse [...]` the natural log of the sum of exp(scaled scores). An empty part has `out = 0`, `lse = -inf`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Partial = tuple[Tensor, Tensor]


def merge(partials: Sequence[Partial]) -> Partial:
    """Merge parts over disjoint key sets as if softmax had seen their union (FlashAttention-2, eq. of section 2.3).

    Each part: out float32 `[..., head_dim]`, lse float32 `[...]`. All parts empty: out 0, lse -inf.
    """
    if len(partials) == 1:
        return partials[0]
    lses = torch.stack([lse for _, lse in partials])  # [num_parts, ...]
    total = torch.logsumexp(lses, dim=0)
    weights = torch.exp(lses - total.masked_fill(total == float("-inf"), 0.0))
    out = torch.zeros_like(partials[0][0])
    for (part_out, _), weight in zip(partials, weights, strict=True):
        out += part_out * weight[..., None]
    return out, total


def empty_partial(shape: tuple[int, ...], device: torch.device) -> Partial:
    """The neutral element of `merge` for an output of `shape [..., head_dim]`."""
    return torch.zeros(shape, device=device), torch.full(shape[:-1], float("-inf"), device=device)
