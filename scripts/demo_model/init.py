"""Initialisation of the demo model: a long-suffix induction circuit instead of random matrices.

A transformer learns to copy by first learning to look at the previous token and then to look for tokens with the same
past (Olsson et al., "In-context Learning and Induction Heads", 2022). Left to chance this takes small models thousands
of steps, so the circuit is laid out at the start and training refines it:

- The residual stream of 256 is divided in blocks: S0 (64) the token itself, S1..S4 (32 each) a projection of the tokens
  1..4 back, S5a and S5b (32 each) a hash of the tokens 4..7 and 5..8 back.
- Layer 0: head h looks h+1 tokens back, by its biases alone: the key bias is a constant vector and the query bias the
  same vector turned by -(h+1) positions, so that RoPE makes their product peak at that distance and nowhere else.
- Layer 1: heads 0 and 1 look 4 and 5 back in the same way and fetch a hash of what layer 0 gathered there.
- Layers 2 and 3: the first KV head matches "my last eight tokens" (query) against "the eight tokens before me" (key),
  in those rotary pairs only that turn little over 128K positions, and copies the token found there.

All else is small Gaussian noise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

S0 = slice(0, 64)
BACK = [slice(64 + 32 * i, 96 + 32 * i) for i in range(4)]
S5A, S5B = slice(192, 224), slice(224, 256)
FIRST_SLOW_PAIR = 14  # pairs from here on turn by less than 0.75 radians over 128K positions
PEAK_LOGIT = 30.0  # per fast pair: puts the aimed-at distance 17 above its neighbours, ln(128K) is 11.8
NOISE = 0.005


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """`[rows, columns]` with orthonormal rows, or columns where those are fewer."""
    gaussian = torch.randn(max(rows, columns), min(rows, columns), generator=generator)
    basis: Tensor = torch.linalg.qr(gaussian).Q
    return basis if rows >= columns else basis.T


def _look_back(attention: LlamaAttention, kv_head: int, offsets: dict[int, int], inv_freq: Tensor) -> None:
    """Biases that make each query head of `offsets` look that many positions back."""
    amplitude = torch.zeros(32)
    amplitude[:FIRST_SLOW_PAIR] = math.sqrt(PEAK_LOGIT * 8)
    with torch.no_grad():
        attention.k_proj.bias[64 * kv_head : 64 * kv_head + 32] = amplitude
        for head, offset in offsets.items():
            attention.q_proj.bias[64 * head : 64 * head + 32] = amplitude * torch.cos(offset * inv_freq)
            attention.q_proj.bias[64 * head + 32 : 64 * head + 64] = -amplitude * torch.sin(offset * inv_freq)


def _match(
    attention: LlamaAttention, hashes: list[Tensor], project: Tensor, unit: float, gain: float, copy: float,
    with_own: bool,
) -> None:  # fmt: skip
    """KV head 0 with its two query heads: match the last eight tokens, copy the token found.

    unit: norm of one block after the layer's RMSNorm. gain: logit per matching token. copy: norm of what is written.
    """
    slow = torch.cat([torch.arange(FIRST_SLOW_PAIR, 32), torch.arange(32 + FIRST_SLOW_PAIR, 64)])
    beta = math.sqrt(8 * gain) / unit
    query, key = torch.zeros(64, 256), torch.zeros(64, 256)
    for index, block in enumerate([S0, *BACK[:3]]):
        if index > 0:
            query[slow, block] = beta * hashes[index]
        elif with_own:
            query[slow, block] = beta * hashes[index] @ project
        key[slow, BACK[index]] = beta * hashes[index]
    if not with_own:
        key[slow, BACK[0]] = 0
    query[slow, S5A] = beta * hashes[4]
    key[slow, S5B] = beta * hashes[4]
    with torch.no_grad():
        for head in (0, 1):
            attention.q_proj.weight[64 * head : 64 * head + 64] += query
            attention.o_proj.weight[S0, 64 * head : 64 * head + 64] += torch.eye(64) * math.sqrt(copy / unit) / 2
        attention.k_proj.weight[:64] += key
        attention.v_proj.weight[:64, S0] += torch.eye(64) * math.sqrt(copy / unit)


def initialise(model: LlamaForCausalLM, seed: int) -> None:
    """Overwrite all weights of `model` (fp32) with the circuit described above."""
    generator = torch.Generator().manual_seed(seed)
    inv_freq = model.model.rotary_emb.inv_freq
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, NOISE, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()
            if "gate_proj" in name or "up_proj" in name:
                parameter.normal_(0, 1 / 16, generator=generator)
            if "down_proj" in name:
                parameter.normal_(0, NOISE / 10, generator=generator)
        embedding = model.model.embed_tokens.weight
        codes = torch.randn(embedding.shape[0], 64, generator=generator)
        embedding[:, S0] += codes / codes.norm(dim=1, keepdim=True)

        project = _orthonormal(32, 64, generator) * math.sqrt(2)  # S0 -> S1..S4
        layers = model.model.layers
        first = layers[0].self_attn  # S0 arrives here with norm 16
        _look_back(first, 0, {0: 1, 1: 2}, inv_freq)
        _look_back(first, 1, {2: 3, 3: 4}, inv_freq)
        for kv_head in (0, 1):
            first.v_proj.weight[64 * kv_head : 64 * kv_head + 64, S0] += torch.eye(64) / 4
        for head in range(4):
            first.o_proj.weight[BACK[head], 64 * head : 64 * head + 64] += project / 4

        second = layers[1].self_attn
        unit = 16 / math.sqrt(5)
        _look_back(second, 0, {0: 4, 1: 5}, inv_freq)
        for index, block in enumerate([S0, *BACK[:3]]):
            spread = _orthonormal(64, 32, generator)
            second.v_proj.weight[:64, block] += (spread @ project if index == 0 else spread) / math.sqrt(unit)
        squeeze = _orthonormal(32, 64, generator) * math.sqrt(2) / math.sqrt(unit)
        second.o_proj.weight[S5A, :64] += squeeze
        second.o_proj.weight[S5B, 64:128] += squeeze

        unit = 16 / math.sqrt(5 + 8)
        size = 2 * (32 - FIRST_SLOW_PAIR)
        for layer, with_own in ((layers[2], True), (layers[3], False)):
            hashes = [_orthonormal(size, 32, generator) for _ in range(5)]
            _match(layer.self_attn, hashes, project, unit, gain=2.5, copy=2.0, with_own=with_own)
