"""What the kinds built on a library (faiss, hnswlib) share.

Owns the lock, the exact fall-backs and the file; a kind adds how its library's object is made, grown,
searched and turned into bytes. Any thread may call; the library's own threads work inside a call.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrieval.index.base import IndexInputError, KeyIndex, append_keys, check_search
from retrieval.index.flat import empty_result, exact_search
from retrieval.index.index_file import read_index_file, write_index_file
from retrieval.index.lock import SharedLock

Floats = NDArray[np.float32]


class LibraryIndex(KeyIndex):
    """An index kept in an object of a library (`_structure`), which copies the keys it is given.

    Fewer than `min_keys` keys are scanned exactly and the structure is made when that many have come: no
    library learns clusters or codebooks from a handful. A query whose result the library cannot fill
    is answered exactly too, so every search returns min(k, visible keys) positions.
    """

    min_keys: ClassVar[int] = 1024

    def __init__(self, keys: Tensor, queries: Tensor, **options: Any) -> None:
        """keys `[num_keys, head_dim]`; `queries` are ignored; `options` are what `save` must keep."""
        super().__init__(keys)
        self._options = options
        self._lock = SharedLock()
        self._structure: Any = None  # filled by the first `_add` that sees `min_keys` keys, or by `load`
        self._add(keys)

    @abstractmethod
    def _create(self, vectors: Floats) -> Any:
        """A structure that has learned from `vectors [num_keys, head_dim]` and holds them."""

    @abstractmethod
    def _append(self, structure: Any, vectors: Floats) -> None:
        """Add `vectors [num_new, head_dim]` behind those held."""

    @abstractmethod
    def _find(self, structure: Any, queries: Tensor, k: int, limit: int) -> tuple[Tensor, Tensor]:
        """Up to k positions below `limit` per query, best first, with their scores; -1 where none."""

    @abstractmethod
    def _count_found(self, k: int, num_visible: int) -> int:
        """Exact inner products of one query in `_find`."""

    @abstractmethod
    def _dump(self, structure: Any) -> bytes:
        """The structure as bytes."""

    @abstractmethod
    def _restore(self, payload: bytes) -> Any:
        """The structure that `_dump` wrote."""

    def insert(self, keys: Tensor) -> None:
        """Append `keys [num_new, head_dim]`; searches wait meanwhile."""
        with self._lock.exclusive():
            self._keys = append_keys(self._keys, keys)
            self._add(keys)

    def search(self, queries: Tensor, k: int, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """See `KeyIndex.search`."""
        check_search(queries, self.head_dim, k, limit)
        if k == 0 or len(queries) == 0:
            return empty_result(len(queries), k)
        with self._lock.shared():
            visible = self._keys[:limit]
            if self._is_scanned(k, len(visible)):
                return exact_search(visible, queries, k)
            positions, scores = self._find(self._structure, queries, k, len(visible))
            is_short = (positions < 0).any(dim=1)
            if is_short.any():
                positions[is_short], scores[is_short] = exact_search(visible, queries[is_short], k)
            return positions, scores

    def count_scored(self, num_queries: int, k: int, num_visible: int) -> int:
        """All visible keys where the search is an exact scan, else what the kind scores."""
        is_scanned = self._is_scanned(k, num_visible)
        return num_queries * (num_visible if is_scanned else self._count_found(k, num_visible))

    def save(self, path: Path) -> None:
        """See `KeyIndex.save`."""
        with self._lock.shared():
            payload = self._dump(self._structure) if self._structure is not None else None
            write_index_file(path, self.kind, self._keys, self._options, payload)

    @classmethod
    def load(cls, path: Path, keys: Tensor) -> Self:
        """See `KeyIndex.load`."""
        options, payload = read_index_file(path, cls.kind, keys)
        try:
            index = cls(keys[:0], keys[:0], **options)
        except TypeError as error:
            raise IndexInputError(f"{path} was written with other options: {error}") from error
        index._keys = keys
        index._structure = index._restore(payload) if payload else None
        return index

    def _add(self, keys: Tensor) -> None:
        if self._structure is not None:
            self._append(self._structure, as_floats(keys))
        elif self.num_keys >= self.min_keys:
            self._structure = self._create(as_floats(self._keys))

    def _is_scanned(self, k: int, num_visible: int) -> bool:
        """Whether an exact scan of the visible keys is the search: few keys, or nearly all are wanted."""
        return self._structure is None or num_visible <= max(2 * k, self.num_keys // 8)


def overfetch(k: int, limit: int, num_keys: int) -> int:
    """How many hits to ask of a library that knows no limit, so that k lie below it if hits are spread evenly."""
    return k if limit >= num_keys else min(num_keys, 2 * k * num_keys // limit)


def drop_beyond(positions: Tensor, scores: Tensor, limit: int, k: int) -> tuple[Tensor, Tensor]:
    """The first k positions below `limit` of each row, order kept, padded with -1 and -inf."""
    is_out = (positions >= limit) | (positions < 0)
    order = torch.argsort(is_out.to(torch.int8), dim=1, stable=True)[:, :k]
    positions = positions.masked_fill(is_out, -1).gather(1, order)
    return positions, scores.masked_fill(is_out, -torch.inf).gather(1, order)


def as_floats(vectors: Tensor) -> Floats:
    """`[n, d]` of any float dtype as a contiguous float32 array, shared with the tensor where it can be."""
    array: Floats = vectors.float().contiguous().numpy()
    return array
