"""The shape of a model's attention, as the KV store and the attention methods need it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Geometry:
    """Numbers of layers and heads; all layers share them (a model where they differ is refused at load)."""

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype  # of K and V as the model computes them
    sliding_windows: tuple[int | None, ...]  # per layer: tokens visible including the present one; None: all

    is_quantized: bool = False  # K and V are stored as int8 with a float32 scale per token and head

    @property
    def kv_dtype(self) -> torch.dtype:
        """Of K and V as stored."""
        return torch.int8 if self.is_quantized else self.dtype

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K, V and their scales of all layers for one token."""
        head_bytes = self.head_dim * self.kv_dtype.itemsize + (4 if self.is_quantized else 0)
        return 2 * self.num_layers * self.num_kv_heads * head_bytes
