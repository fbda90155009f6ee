"""Kind `rabitq`: a few bits per dimension of every key, scanned with bounds; what could matter is scored exactly.

Owns the codes (`_core.LayerCodes`) of one head. Any thread may call: the core lets searches run while keys are
appended, and a search sees the keys that were there when it began. Needs the C++ core.

Source: RaBitQ (arXiv 2405.12497) and its extension to more bits (arXiv 2409.09913); deviations in csrc/codes.h.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from retrieval import _core
from retrieval.index.base import AttendStats, IndexInputError, KeyIndex, append_keys, check_search
from retrieval.index.flat import empty_result
from retrieval.index.index_file import read_index_file, write_index_file

BITS = 2


class RabitqIndex(KeyIndex):
    """Codes of a few bits: nothing is learned from queries, so no query is out of its distribution."""

    kind = "rabitq"

    def __init__(
        self, keys: Tensor, queries: Tensor, bits: int = BITS, deviations: float = 3.5, beta: float = 0.0, seed: int = 0
    ) -> None:
        """bits: per dimension, 1 to 4. deviations: how far above its estimate a key may score and still be
        found, in standard deviations. beta: 0, or `attend` leaves out keys more than `beta` nats below the best even
        if they are among the k. seed: of the rotation. `queries` are ignored.
        """
        super().__init__(keys)
        self._options = {"bits": bits, "deviations": deviations, "beta": beta, "seed": seed}
        self._insert_lock = threading.Lock()
        self._codes = _core.LayerCodes(1, self.head_dim, bits, seed)
        self._codes.append(keys.contiguous()[None])
        self._last = (1, 1.0, 1.0)  # visible keys, scored and bytes per query of the latest search

    def insert(self, keys: Tensor) -> None:
        """Append `keys [num_new, head_dim]`."""
        with self._insert_lock:
            held = append_keys(self._keys, keys)
            self._codes.append(keys.contiguous()[None])
            self._keys = held

    def search(self, queries: Tensor, k: int, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """See `KeyIndex.search`."""
        check_search(queries, self.head_dim, k, limit)
        positions, scores = empty_result(len(queries), k)
        keys = self._keys
        if k == 0 or len(queries) == 0 or len(keys[:limit]) == 0:
            return positions, scores
        part = self._part(keys, keys, limit)
        stats = _core.search(queries.contiguous(), part, k, positions, scores, self._budget(k))
        self._note(stats, len(queries), part.end)
        return positions, scores

    def attend(
        self, queries: Tensor, values: Tensor, k: int, scale: float, limit: int | None = None
    ) -> tuple[Tensor, Tensor, AttendStats]:
        """See `KeyIndex.attend`; keys that tie with the k-th take part too."""
        check_search(queries, self.head_dim, k, limit)
        keys = self._keys
        if values.ndim != 2 or len(values) < len(keys) or values.shape[1] != self.head_dim:
            raise IndexInputError(f"values must be [>= {len(keys)}, {self.head_dim}], got {list(values.shape)}")
        out, lse = torch.zeros(len(queries), self.head_dim), torch.full((len(queries),), -torch.inf)
        visible = len(keys[:limit])
        if k == 0 or len(queries) == 0 or visible == 0:
            return out, lse, AttendStats(len(queries), visible, 0, 0)
        part = self._part(keys, values[: len(keys)], limit)
        stats = _core.attend_layer(queries.contiguous()[None], [[part]], scale, out[None], lse[None], self._budget(k))
        self._note(stats, len(queries), visible)
        num_scored = min(stats.num_scored, len(queries) * visible)  # a key that set the threshold is scored twice
        return out, lse, AttendStats(len(queries), visible, num_scored, stats.num_retrieved)

    def count_scored(self, num_queries: int, k: int, num_visible: int) -> int:
        """As the latest search or attention went: the bounds decide, not k alone."""
        visible, scored, _ = self._last
        return min(num_queries * num_visible, round(num_queries * scored * num_visible / visible))

    def count_bytes_read(self, num_queries: int, k: int, num_visible: int) -> int:
        """Codes, and the keys scored, as the latest search or attention went."""
        visible, _, num_bytes = self._last
        return round(num_queries * num_bytes * num_visible / visible)

    @property
    def nbytes(self) -> int:
        """Planes and factors, in whole chunks of 2048 keys."""
        return self._codes.nbytes

    @classmethod
    def most_bytes(cls, num_keys: int, head_dim: int, element_size: int, bits: int = BITS, **options: Any) -> int:
        """See `KeyIndex.most_bytes`."""
        return _core.LayerCodes.most_bytes(1, head_dim, bits, num_keys)

    def save(self, path: Path) -> None:
        """See `KeyIndex.save`."""
        with self._insert_lock:
            write_index_file(path, self.kind, self._keys, self._options, self._codes.save())

    @classmethod
    def load(cls, path: Path, keys: Tensor) -> Self:
        """See `KeyIndex.load`."""
        options, payload = read_index_file(path, cls.kind, keys)
        index = cls(keys[:0], keys[:0], **options)
        try:
            index._codes = _core.LayerCodes.load(payload or b"")
        except ValueError as error:
            raise IndexInputError(f"{path}: {error}") from error
        if index._codes.num_keys != len(keys) or index._codes.head_dim != keys.shape[1]:
            raise IndexInputError(f"{path} holds codes of other keys")
        index._keys = keys
        return index

    def _part(self, keys: Tensor, values: Tensor, limit: int | None) -> _core.Part:
        """The visible keys as the core sees them; dtypes made equal, rows made dense."""
        end = len(keys[:limit])
        return _core.Part(keys.contiguous()[None], values.to(keys.dtype).contiguous()[None], 0, end, self._codes)

    def _budget(self, k: int) -> _core.Budget:
        return _core.Budget(k=k, beta=self._options["beta"] or 1e9, deviations=self._options["deviations"], min_keys=1)

    def _note(self, stats: _core.AttendStats, num_queries: int, visible: int) -> None:
        self._last = (max(1, visible), stats.num_scored / num_queries, stats.bytes_read / num_queries)
