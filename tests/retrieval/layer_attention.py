"""The plain twin of the core's `attend_layer`: the same call in torch, every part attended exactly.

Knows only tensors; runs on the caller's thread.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from retrieval.merge import empty_partial, merge
from retrieval.partial_attention import attend_masked


@dataclass(slots=True)
class ExactPart:
    """Positions [begin, end) of one segment and layer.

    keys, values `[num_kv_heads, capacity, head_dim]`; int8 ones with float32 scales `[num_kv_heads, capacity]`.
    """

    keys: Tensor
    values: Tensor
    begin: int
    end: int
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


def attend_layer(queries: Tensor, parts: list[list[ExactPart]], scale: float, out: Tensor, lse: Tensor) -> None:
    """queries `[num_seqs, num_q_heads, head_dim]`; fills out and lse as `_core.attend_layer` does."""
    for seq, row in enumerate(queries):
        partials = [empty_partial(tuple(row.shape), row.device)]
        partials += [_attend(row, part, scale) for part in parts[seq] if part.end > part.begin]
        merged_out, merged_lse = merge(partials)
        out[seq], lse[seq] = merged_out, merged_lse


def _attend(queries: Tensor, part: ExactPart, scale: float) -> tuple[Tensor, Tensor]:
    keys = _widen(part.keys, part.key_scales)[:, part.begin : part.end]
    values = _widen(part.values, part.value_scales)[:, part.begin : part.end]
    mask = torch.ones(1, keys.shape[1], dtype=torch.bool)
    out, lse = attend_masked(queries[:, None].float(), keys, values, scale, mask)
    return out[:, 0], lse[:, 0]


def _widen(rows: Tensor, scales: Tensor | None) -> Tensor:
    return rows.float() if scales is None else rows.float() * scales[..., None]
