"""The vectors a benchmark runs on: one attention layer at a time, from a capture or made up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from retrieval.geometry import Geometry
from retrieval.kv_buffer import KvBuffer

# Meta-Llama-3-8B's attention.
NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
TOPIC_KEYS = 64  # keys that share a topic, in two runs
RUN_KEYS = 32  # neighbours in the text that share one
NUM_TRAIN = 8192  # training queries per KV head
KNOWN_TOPICS = 0.7  # share of topics that the prompt's own queries ask for


@dataclass(frozen=True, slots=True)
class Layer:
    """Keys and values of one layer, and what is asked of them."""

    layer_idx: int
    keys: Tensor  # [num_kv_heads, num_keys, head_dim]
    values: Tensor
    train: Tensor  # [num_q_heads, num_rows, head_dim], for building
    asked: dict[str, Tensor]  # set ("same", "later") -> [num_q_heads, num_rows, head_dim]
    scale: float

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.train.shape[0] // self.keys.shape[0]

    def grouped(self, queries: Tensor) -> Tensor:
        """`[num_q_heads, n, d]` -> `[num_kv_heads, group_size * n, d]`."""
        return queries.reshape(self.keys.shape[0], -1, queries.shape[-1])


def served(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """K and V `[num_kv_heads, num_keys, head_dim]` in such memory as the server keeps them in."""
    num_kv_heads, num_keys, head_dim = keys.shape
    kv = KvBuffer(Geometry(1, num_kv_heads, num_kv_heads, head_dim, keys.dtype, (None,)), num_keys, keys.device)
    kv.write(0, keys, values)
    kv.commit(num_keys)
    return kv.keys[0], kv.values[0]


def captured_layers(
    path: Path, wanted: list[int] | None, heads: list[int] | None, num_rows: int
) -> tuple[dict[str, Any], Iterator[Layer]]:
    """What a file of scripts/bench/capture.py says about itself, and its layers one by one."""
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["capture"])
    layers = range(about["num_layers"]) if wanted is None else wanted
    return about, (_captured_layer(path, layer_idx, heads, num_rows, about["scale"]) for layer_idx in layers)


def _captured_layer(path: Path, layer_idx: int, heads: list[int] | None, num_rows: int, scale: float) -> Layer:
    with safe_open(path, framework="pt") as file:
        keys, values = (file.get_tensor(f"{name}.{layer_idx}") for name in ("keys", "values"))
        chosen = torch.tensor(heads if heads is not None else list(range(keys.shape[0])))
        queries = {}
        for name in ("train", "same", "later"):
            rows = file.get_tensor(f"{name}.{layer_idx}").unflatten(0, (keys.shape[0], -1))[chosen].flatten(0, 1)
            queries[name] = rows if name == "train" else spread(rows, num_rows)
    asked = {name: queries[name] for name in ("same", "later")}
    return Layer(layer_idx, *served(keys[chosen], values[chosen]), queries["train"], asked, scale)


def spread(rows: Tensor, count: int) -> Tensor:
    """`count` of the rows `[heads, n, d]`, evenly spread (questions stand one behind the other)."""
    return rows[:, torch.linspace(0, rows.shape[1] - 1, min(count, rows.shape[1])).long()].contiguous()


def synthetic_layers(
    num_keys: int, wanted: list[int] | None, heads: list[int] | None, num_rows: int, gap: float, seed: int
) -> tuple[dict[str, Any], Iterator[Layer]]:
    """Layers of Llama-3-8B's geometry; see `_synthetic_head` for what the vectors are."""
    about = {"model": "synthetic", "num_tokens": num_keys, "gap": gap, "seed": seed, "scale": HEAD_DIM**-0.5}
    num_heads = NUM_KV_HEADS if heads is None else len(heads)
    layers = [0] if wanted is None else wanted
    return about, (_synthetic_layer(i, num_heads, num_keys, num_rows, gap, seed) for i in layers)


def _synthetic_layer(layer_idx: int, num_heads: int, num_keys: int, num_rows: int, gap: float, seed: int) -> Layer:
    generator = torch.Generator().manual_seed(1000 * seed + layer_idx)
    heads = [_synthetic_head(num_keys, num_rows, gap, generator) for _ in range(num_heads)]
    keys, values = (torch.stack([head[name] for head in heads]) for name in ("keys", "values"))
    train, same, later = (torch.cat([head[name] for head in heads]) for name in ("train", "same", "later"))
    return Layer(layer_idx, *served(keys, values), train, {"same": same, "later": later}, HEAD_DIM**-0.5)


def _synthetic_head(num_keys: int, num_rows: int, gap: float, generator: torch.Generator) -> dict[str, Tensor]:
    """One KV head: keys whose content comes in topics, and queries that look for single keys.

    Content `c = (topic + own) / √2` is isotropic. Keys are `R S c + mean`, queries `R S⁻¹ (α c' + bias + noise)` with
    R a rotation and S scales from 1/gap to gap: what a query means is its product with content, yet its large
    coordinates are where those of the keys are small, so a query lies far from every key. c' is a key's content with
    its topic weighed 1 to 2 times, so that from one key to the whole topic matter; α grows over the heads of the
    group from diffuse to sharp (the exact top 100 of 128K keys hold about 0.9 to 1.0 of the softmax mass). Queries
    of the prompt itself (`train`, `same`) look for `KNOWN_TOPICS` of the topics, those asked later for the others.
    """

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    group_size = NUM_Q_HEADS // NUM_KV_HEADS
    num_topics = max(2, num_keys // TOPIC_KEYS)
    runs = torch.randint(0, num_topics, (num_keys // RUN_KEYS + 1,), generator=generator)
    topic = runs.repeat_interleave(RUN_KEYS)[:num_keys]
    themes, own = randn(num_topics, HEAD_DIM), randn(num_keys, HEAD_DIM)
    content = (themes[topic] + own) / 2**0.5
    scales = gap ** torch.linspace(-1, 1, HEAD_DIM)
    rotation = torch.linalg.qr(randn(HEAD_DIM, HEAD_DIM)).Q
    is_known = torch.arange(num_topics) < KNOWN_TOPICS * num_topics
    bias = randn(HEAD_DIM) / 2
    sharpness = torch.linspace(1.2, 1.8, group_size)[:, None, None]

    def queries(num: int, known: bool) -> Tensor:
        candidates = (is_known[topic] == known).nonzero()[:, 0]
        targets = candidates[torch.randint(0, len(candidates), (group_size, num), generator=generator)]
        weight = 1 + torch.rand(group_size, num, 1, generator=generator)
        sought = (weight * themes[topic[targets]] + own[targets]) / 2**0.5
        meant = sharpness * sought + bias + randn(group_size, num, HEAD_DIM) / 2
        return ((meant / scales) @ rotation.T).bfloat16()

    keys = ((content * scales) @ rotation.T + 2 * randn(HEAD_DIM)).bfloat16()
    values = (randn(num_topics, HEAD_DIM)[topic] + randn(num_keys, HEAD_DIM) + randn(HEAD_DIM)).bfloat16()
    return {
        "keys": keys, "values": values, "train": queries(NUM_TRAIN // group_size, True),
        "same": queries(num_rows, True), "later": queries(num_rows, False),
    }  # fmt: skip


def query_key_gap(layer: Layer, name: str) -> float:
    """Median Mahalanobis distance of queries from the keys' distribution over that of the keys themselves.

    The measure of RetrievalAttention (arXiv 2409.10516, section 2.4), averaged over KV heads.
    """
    ratios = []
    for keys, queries in zip(layer.keys, layer.grouped(layer.asked[name]), strict=True):
        sample = keys[:: max(1, len(keys) // 20_000)].double()
        mean = sample.mean(dim=0)
        covariance = torch.cov(sample.T) + 1e-9 * torch.eye(keys.shape[1], dtype=torch.float64)
        factor = torch.linalg.cholesky(covariance)

        def distance(vectors: Tensor, factor: Tensor = factor, mean: Tensor = mean) -> Tensor:
            return torch.linalg.solve_triangular(factor, (vectors.double() - mean).T, upper=False).norm(dim=0).median()

        ratios.append(float(distance(queries) / distance(sample)))
    return sum(ratios) / len(ratios)
