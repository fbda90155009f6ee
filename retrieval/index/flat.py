"""Kind `flat`: every key is scored. The oracle of every test and the fall-back of every other kind.

Owns the exact arithmetic (inner products in float32, top k). Runs on the caller's thread, with torch's
own threads inside; lock-free, because `insert` only replaces one reference.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrieval.index.base import KeyIndex, append_keys, check_search
from retrieval.index.index_file import read_index_file, write_index_file

KEY_BLOCK = 8192  # keys widened to float32 at a time: 4 MB at head_dim 128, which stays in cache
QUERY_BLOCK = 64  # queries whose full rows of scores are held at a time: 32 MB over 128K keys


class FlatIndex(KeyIndex):
    """Exact maximum-inner-product search; holds nothing but a reference to the keys."""

    kind = "flat"

    def __init__(self, keys: Tensor, queries: Tensor) -> None:
        """keys `[num_keys, head_dim]`; `queries` are ignored."""
        super().__init__(keys)
        self._insert_lock = threading.Lock()

    def insert(self, keys: Tensor) -> None:
        """Append `keys [num_new, head_dim]`."""
        with self._insert_lock:
            self._keys = append_keys(self._keys, keys)

    def search(self, queries: Tensor, k: int, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """The exact top k; see `KeyIndex.search`."""
        check_search(queries, self.head_dim, k, limit)
        return exact_search(self._keys[:limit], queries, k)

    def count_scored(self, num_queries: int, k: int, num_visible: int) -> int:
        """Every visible key, for every query."""
        return num_queries * num_visible

    @property
    def nbytes(self) -> int:
        """Nothing besides the keys."""
        return 0

    @classmethod
    def most_bytes(cls, num_keys: int, head_dim: int, element_size: int, **options: Any) -> int:
        """See `KeyIndex.most_bytes`."""
        return 0

    def save(self, path: Path) -> None:
        """Write the header alone: the keys are the index."""
        write_index_file(path, self.kind, self._keys)

    @classmethod
    def load(cls, path: Path, keys: Tensor) -> FlatIndex:
        """See `KeyIndex.load`."""
        read_index_file(path, cls.kind, keys)
        return cls(keys, keys[:0])


def exact_search(keys: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Exact top k of each query over all `keys [num_keys, head_dim]`, padded as `KeyIndex.search` says."""
    positions, scores = empty_result(len(queries), k)
    num_found = min(k, len(keys))
    for start in range(0, len(queries), QUERY_BLOCK):
        rows = slice(start, start + QUERY_BLOCK)
        top = torch.topk(inner_products(queries[rows], keys), num_found, dim=1)
        scores[rows, :num_found] = top.values
        positions[rows, :num_found] = top.indices
    return positions, scores


def inner_products(queries: Tensor, keys: Tensor) -> Tensor:
    """`[num_queries, d]`, `[num_keys, d]` -> float32 `[num_queries, num_keys]`, accumulated in float32."""
    scores = torch.empty(len(queries), len(keys))
    for start in range(0, len(keys), KEY_BLOCK):
        columns = slice(start, start + KEY_BLOCK)
        scores[:, columns] = queries.float() @ keys[columns].float().T
    return scores


def rescore(keys: Tensor, queries: Tensor, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best k of `candidates` int64 `[num_queries, num_candidates]` (-1 = none) by exact inner product."""
    exact = torch.einsum("nd,ncd->nc", queries.float(), keys[candidates.clamp_min(0)].float())
    top = torch.topk(exact.masked_fill(candidates < 0, -torch.inf), min(k, candidates.shape[1]), dim=1)
    positions, scores = empty_result(len(queries), k)
    scores[:, : top.values.shape[1]] = top.values
    positions[:, : top.values.shape[1]] = candidates.gather(1, top.indices)
    return positions, scores


def empty_result(num_queries: int, k: int) -> tuple[Tensor, Tensor]:
    """A result with nothing found: positions -1, scores -inf, both `[num_queries, k]`."""
    return torch.full((num_queries, k), -1), torch.full((num_queries, k), -torch.inf)
