"""Exact attention over one block of keys with its log-sum-exp: the building block of every merge.

Knows only tensors. Runs where its tensors are: CPU (torch's flash kernel, AMX and AVX-512 where there) or CUDA.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retrieval.merge import Partial


def attend_block(queries: Tensor, keys: Tensor, values: Tensor, scale: float, is_causal: bool = False) -> Partial:
    """Softmax attention with lse: queries `[heads, n, d]`, keys and values `[heads, m, d]`, same device and dtype,
    the last dimension dense.

    With `is_causal`, n == m and query i sees keys 0..i. Returns out float32 `[heads, n, d]`, lse float32 `[heads, n]`.
    """
    q, k, v = queries[None], keys[None], values[None]
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=scale)
    elif q.dtype in (torch.bfloat16, torch.float16):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)[:2]
    else:
        out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, is_causal, scale=scale
        )[:2]
    return out[0].float(), lse[0, :, : queries.shape[1]].float()


def attend_grouped(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Partial:
    """As `attend_block` over keys all queries see, for grouped heads.

    queries `[num_q_heads, n, d]`, keys and values `[num_kv_heads, m, d]`: the rows of a group share one pass
    over its keys. Returns out `[num_q_heads, n, d]`, lse `[num_q_heads, n]`, float32.
    """
    num_q_heads, n, d = queries.shape
    out, lse = attend_block(queries.reshape(keys.shape[0], -1, d), keys, values, scale)
    return out.reshape(num_q_heads, n, d), lse.reshape(num_q_heads, n)


def attend_masked(queries: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor) -> Partial:
    """As `attend_grouped` with a boolean mask `[n, m]`, True where a query sees a key; rows may be empty."""
    num_q_heads, n, d = queries.shape
    grouped = queries.reshape(keys.shape[0], -1, n, d).float()  # [num_kv_heads, group, n, d]
    scores = torch.einsum("hgnd,hmd->hgnm", grouped, keys.float()) * scale
    scores = scores.masked_fill(~mask, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    out = torch.einsum("hgnm,hmd->hgnd", weights, values.float())
    return out.reshape(num_q_heads, n, d), lse.reshape(num_q_heads, n)
