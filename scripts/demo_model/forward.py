"""Forward passes of the demo model for training, written over transformers' own modules.

Training needs two things that the stock forward has no room for: a bias per key (one key standing for many) and
positions with jumps, both without a `[row, row]` mask.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

EXTRA_DIM = 16  # widens heads for the bias; a multiple of 16 keeps the fast kernels


def causal_attention(query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None) -> Tensor:
    """query `[rows, num_q_heads, length, 64]`, key and value with num_kv_heads, key_bias `[rows, length]` natural log.

    A key with bias ln(m) weighs as much as m copies of itself. The bias rides in extra dimensions, query 1 and key
    bias / scale, so the causal kernel needs no mask.
    """
    group_size = query.shape[1] // key.shape[1]
    scale = 1 / math.sqrt(query.shape[-1])
    head_dim = query.shape[-1]
    key, value = key.repeat_interleave(group_size, dim=1), value.repeat_interleave(group_size, dim=1)
    if key_bias is not None:
        ones = torch.zeros(*query.shape[:-1], EXTRA_DIM, dtype=query.dtype)
        ones[..., 0] = 1
        biases = torch.zeros(*key.shape[:-1], EXTRA_DIM, dtype=key.dtype)
        biases[..., 0] = (key_bias / scale).to(key.dtype)[:, None, :]
        query, key = torch.cat([query, ones], dim=-1), torch.cat([key, biases], dim=-1)
        value = functional.pad(value, (0, EXTRA_DIM))
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)[..., :head_dim]


def logits(model: LlamaForCausalLM, tokens: Tensor, positions: Tensor, key_bias: Tensor | None) -> Tensor:
    """`[rows, length, vocab_size]` for tokens and positions `[rows, length]`."""
    rows, length = tokens.shape
    hidden = model.model.embed_tokens(tokens)
    cos, sin = model.model.rotary_emb(hidden, positions)
    for layer in model.model.layers:
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden)
        query, key, value = (
            projection(normed).view(rows, length, -1, attention.head_dim).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        out = causal_attention(query.to(value.dtype), key.to(value.dtype), value, key_bias)
        hidden = hidden + attention.o_proj(out.transpose(1, 2).reshape(rows, length, -1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return cast(Tensor, model.lm_head(model.model.norm(hidden)))
