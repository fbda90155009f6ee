"""What K and V of given tokens depend on, as one short text: two models that share it may share their caches.

The tokenizer has no part in it: stored prefixes are found by token ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor

from retrieval.geometry import Geometry

PIECE_BYTES = 64 * 2**20  # copied from a device at a time


def fingerprint(config: Mapping[str, Any], weights: Mapping[str, Any], geometry: Geometry) -> str:
    """XXH3-128 over every byte: a change of one row of one matrix is another model."""
    digest = xxhash.xxh3_128()
    said = {"config": config, "dtype": str(geometry.dtype), "kv_dtype": str(geometry.kv_dtype)}
    digest.update(json.dumps(said, sort_keys=True, default=str).encode())
    for name in sorted(weights):
        tensor = weights[name]
        if not isinstance(tensor, Tensor):  # how a quantized checkpoint describes itself
            digest.update(f"{name} {tensor!r}".encode())
            continue
        tensor = tensor.detach()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        for begin in range(0, len(flat), PIECE_BYTES):
            digest.update(flat[begin : begin + PIECE_BYTES].cpu().numpy().data)
    return digest.hexdigest()
