"""The weights of a fused forward, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """Weights of one decoder layer; `qkv` and `gate_up` are concatenated along their outputs."""

    input_norm: Tensor  # [hidden]
    qkv: Tensor  # [(num_q_heads + 2 * num_kv_heads) * head_dim, hidden]
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # [head_dim], Qwen3
    k_norm: Tensor | None
    out: Tensor  # [hidden, num_q_heads * head_dim]
    out_bias: Tensor | None
    post_norm: Tensor
    gate_up: Tensor  # [2 * intermediate, hidden]
    down: Tensor  # [hidden, intermediate]
    scale: float
    sliding_window: int | None


@dataclass(frozen=True, slots=True)
class Weights:
    """All weights of one forward, in one dtype."""

    embedding: Tensor  # [vocab_size, hidden]
    layers: list[FusedLayer]
    norm: Tensor
    head: Tensor  # [vocab_size, hidden]
    head_bias: Tensor | None
