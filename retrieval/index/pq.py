"""Kind `pq`: product quantization, all codes scanned, the best rescored exactly (faiss)."""

from __future__ import annotations

from typing import Any

import faiss
import torch
from torch import Tensor

from retrieval.index.base import IndexInputError
from retrieval.index.faiss_index import FaissIndex, one_thread
from retrieval.index.flat import rescore
from retrieval.index.library import Floats, as_floats, drop_beyond, overfetch

BITS = 4  # what faiss's SIMD scan takes
DIMS_PER_CODE = 2  # 2 bits per dimension


class PqIndex(FaissIndex):
    """4-bit product codes scanned with SIMD table look-ups (IndexPQFastScan)."""

    kind = "pq"

    def __init__(self, keys: Tensor, queries: Tensor, num_rescored: int = 1000) -> None:
        """num_rescored: candidates per query whose exact inner product is computed; at least k."""
        if keys.shape[1] % DIMS_PER_CODE:
            raise IndexInputError(f"pq needs an even head_dim, got {keys.shape[1]}")
        super().__init__(keys, queries, num_rescored=num_rescored)

    def _create(self, vectors: Floats) -> Any:
        head_dim = vectors.shape[1]
        structure = faiss.IndexPQFastScan(head_dim, head_dim // DIMS_PER_CODE, BITS, faiss.METRIC_INNER_PRODUCT)
        with one_thread():
            structure.train(vectors)
        structure.add(vectors)
        return structure

    def _find(self, structure: Any, queries: Tensor, k: int, limit: int) -> tuple[Tensor, Tensor]:
        num_candidates = min(self._num_rescored(k), limit)
        estimates, candidates = structure.search(as_floats(queries), overfetch(num_candidates, limit, self.num_keys))
        positions, _ = drop_beyond(torch.from_numpy(candidates), torch.from_numpy(estimates), limit, num_candidates)
        return rescore(self._keys, queries, positions, k)

    def _num_rescored(self, k: int) -> int:
        return max(k, int(self._options["num_rescored"]))

    def _count_found(self, k: int, num_visible: int) -> int:
        return min(self._num_rescored(k), num_visible)

    def count_bytes_read(self, num_queries: int, k: int, num_visible: int) -> int:
        """All codes once per query, and the rescored keys."""
        return super().count_bytes_read(num_queries, k, num_visible) + num_queries * self.nbytes

    @property
    def nbytes(self) -> int:
        """The codes and the codebooks."""
        return 0 if self._structure is None else self.most_bytes(self.num_keys, self.head_dim, 0)

    @classmethod
    def most_bytes(cls, num_keys: int, head_dim: int, element_size: int, **options: Any) -> int:
        """See `KeyIndex.most_bytes`."""
        codebook_bytes = (1 << BITS) * head_dim * 4
        return num_keys * head_dim // DIMS_PER_CODE * BITS // 8 + codebook_bytes
