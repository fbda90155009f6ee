"""The index contract: what a vector index over the keys of one layer and KV head offers.

Owns the interface, the registry of kinds and the validation every kind shares. Knows nothing of
segments, sequences or models. Threads: `search` and `attend` may run on several threads at once;
`insert` excludes them through the lock each kind holds.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

KINDS: dict[str, str] = {
    "flat": "retrieval.index.flat:FlatIndex",
    "ivf": "retrieval.index.ivf:IvfIndex",
    "pq": "retrieval.index.pq:PqIndex",
    "hnsw": "retrieval.index.hnsw:HnswIndex",
    "roar": "retrieval.index.roar:RoarIndex",
    "rabitq": "retrieval.index.rabitq:RabitqIndex",
}


class IndexInputError(ValueError):
    """Keys or queries that no index can hold: wrong rank, width, dtype or device, NaN or infinity."""


@dataclass(frozen=True, slots=True)
class AttendStats:
    """What one `attend` call cost, summed over its queries."""

    num_queries: int
    num_keys: int  # keys visible to each query (after `limit`)
    num_scored: int  # exact inner products computed, over all queries
    num_retrieved: int  # keys whose value entered an output, over all queries

    @property
    def share_scanned(self) -> float:
        """Exact inner products per visible key and query, in [0, 1]."""
        return self.num_scored / max(1, self.num_queries * self.num_keys)


class KeyIndex(ABC):
    """A maximum-inner-product index over `keys [num_keys, head_dim]`.

    Scores are raw inner products <q, k>, never distances and never scaled. An index does not own the
    keys: it reads them where they are (a CPU tensor that the caller keeps alive and unchanged).
    """

    kind: ClassVar[str]

    def __init__(self, keys: Tensor) -> None:
        check_vectors("keys", keys)
        self._keys = keys

    @property
    def keys(self) -> Tensor:
        """`[num_keys, head_dim]`, CPU, the dtype they were given in."""
        return self._keys

    @property
    def num_keys(self) -> int:
        """Number of keys held."""
        return int(self._keys.shape[0])

    @property
    def head_dim(self) -> int:
        """Width of a key."""
        return int(self._keys.shape[1])

    @abstractmethod
    def insert(self, keys: Tensor) -> None:
        """Append `keys [num_new, head_dim]`; they take the positions after the present ones."""

    @abstractmethod
    def search(self, queries: Tensor, k: int, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """The (approximately) best k keys of each query among positions below `limit`.

        queries: `[num_queries, head_dim]`, CPU. Returns `positions` int64 `[num_queries, k]` padded
        with -1 and `scores` float32 `[num_queries, k]`, descending, padded with -inf. Raises
        `IndexInputError` on bad queries and on a negative `k` or `limit`.
        """

    def attend(
        self, queries: Tensor, values: Tensor, k: int, scale: float, limit: int | None = None
    ) -> tuple[Tensor, Tensor, AttendStats]:
        """Softmax attention of each query over its retrieved keys only.

        queries `[num_queries, head_dim]`, values `[>= num_keys, head_dim]`; returns `out` float32
        `[num_queries, head_dim]`, `lse` float32 `[num_queries]` (natural log of the sum of
        exp(scale * <q, k>) over the retrieved keys) and the cost. No visible key: `out` 0, `lse` -inf.
        """
        positions, scores = self.search(queries, k, limit)
        out, lse = attend_positions(positions, scores, values, scale)
        visible = self.num_keys if limit is None else min(limit, self.num_keys)
        num_retrieved = int((positions >= 0).sum())
        stats = AttendStats(len(queries), visible, self.count_scored(len(queries), k, visible), num_retrieved)
        return out, lse, stats

    @abstractmethod
    def count_scored(self, num_queries: int, k: int, num_visible: int) -> int:
        """Exact (full precision) inner products that `search` of `num_queries` queries computes."""

    def count_bytes_read(self, num_queries: int, k: int, num_visible: int) -> int:
        """Bytes of keys and codes that such a `search` reads; kinds that scan codes add theirs."""
        return self.count_scored(num_queries, k, num_visible) * self.head_dim * self._keys.element_size()

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held by the index itself, the keys not counted."""

    @classmethod
    @abstractmethod
    def most_bytes(cls, num_keys: int, head_dim: int, element_size: int, **options: Any) -> int:
        """What `nbytes` is at most with so many keys of `element_size` bytes a coordinate, built with these options."""

    @abstractmethod
    def save(self, path: Path) -> None:
        """Write the index to one file. Durability (fsync, rename) is the caller's."""

    @classmethod
    @abstractmethod
    def load(cls, path: Path, keys: Tensor) -> KeyIndex:
        """Read an index written by `save`; `keys` are those it was saved with. Raises `IndexInputError`
        on a file of another kind, shape or format version, or a truncated one."""


def build(kind: str, keys: Tensor, queries: Tensor, **options: Any) -> KeyIndex:
    """Build an index of `kind` over keys `[num_keys, head_dim]` of one layer and KV head.

    queries: `[num_queries, head_dim]` sampled over the group's query heads during prefill (may be
    empty); kinds that are not attention-aware ignore them. Raises `IndexInputError` on bad tensors,
    `KeyError`-derived `UnknownIndexKindError` on an unknown kind, `TypeError` on an unknown option.
    """
    check_vectors("keys", keys)
    check_vectors("queries", queries, head_dim=int(keys.shape[1]))
    index: KeyIndex = kind_class(kind)(keys, queries, **options)
    return index


class UnknownIndexKindError(KeyError):
    """No index kind of that name."""


def kind_class(kind: str) -> Any:
    """The class behind a kind's name, imported on first use (faiss and hnswlib are slow to import)."""
    if kind not in KINDS:
        raise UnknownIndexKindError(f"unknown index kind {kind!r}; known: {', '.join(sorted(KINDS))}")
    module_name, _, class_name = KINDS[kind].partition(":")
    return getattr(importlib.import_module(module_name), class_name)


def check_vectors(name: str, vectors: Tensor, head_dim: int | None = None) -> None:
    """Raise `IndexInputError` unless `vectors` is a finite CPU float matrix of width `head_dim`."""
    if vectors.ndim != 2:
        raise IndexInputError(f"{name} must be [count, head_dim], got shape {tuple(vectors.shape)}")
    if vectors.dtype not in FLOAT_DTYPES:
        raise IndexInputError(f"{name} must be bfloat16, float16 or float32, got {vectors.dtype}")
    if vectors.device.type != "cpu":
        raise IndexInputError(f"{name} must be on the CPU, got {vectors.device}")
    if head_dim is not None and vectors.shape[1] != head_dim:
        raise IndexInputError(f"{name} must be {head_dim} wide, got {vectors.shape[1]}")
    if not bool(torch.isfinite(vectors).all()):
        raise IndexInputError(f"{name} hold NaN or infinity")


def check_search(queries: Tensor, head_dim: int, k: int, limit: int | None) -> None:
    """Raise `IndexInputError` unless these are arguments that `search` accepts."""
    check_vectors("queries", queries, head_dim)
    if k < 0:
        raise IndexInputError(f"k must not be negative, got {k}")
    if limit is not None and limit < 0:
        raise IndexInputError(f"limit must not be negative, got {limit}")


def append_keys(held: Tensor, new: Tensor) -> Tensor:
    """`held [n, d]` followed by `new [m, d]`: a view where `new` lies right behind `held` in one growing
    buffer, else a copy. Raises `IndexInputError` on another width or dtype."""
    check_vectors("keys", new, int(held.shape[1]))
    if new.dtype != held.dtype:
        raise IndexInputError(f"keys must be {held.dtype} like those held, got {new.dtype}")
    is_one_buffer = held.untyped_storage().data_ptr() == new.untyped_storage().data_ptr()
    end = held.storage_offset() + held.shape[0] * held.stride(0)
    if is_one_buffer and held.stride() == new.stride() and new.storage_offset() == end:
        return held.as_strided((held.shape[0] + new.shape[0], held.shape[1]), held.stride())
    return torch.cat((held, new))


def attend_positions(positions: Tensor, scores: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax over given keys: positions `[n, k]` (-1 = none), scores `[n, k]` -> out `[n, d]`, lse `[n]`."""
    logits = (scores.float() * scale).masked_fill(positions < 0, float("-inf"))
    lse = torch.logsumexp(logits, dim=1)
    if len(values) == 0:
        return torch.zeros(len(positions), values.shape[1]), lse
    weights = torch.exp(logits - lse.masked_fill(lse.isinf(), 0.0)[:, None])
    gathered = values[positions.clamp_min(0)].float()  # [n, k, d]
    return torch.einsum("nk,nkd->nd", weights, gathered), lse
