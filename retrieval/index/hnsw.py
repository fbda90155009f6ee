"""Kind `hnsw`: the hierarchical navigable small-world graph over the keys (hnswlib)."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hnswlib
import numpy as np
import torch
from torch import Tensor

from retrieval.index.flat import empty_result
from retrieval.index.library import Floats, LibraryIndex, as_floats, drop_beyond, overfetch

M = 16
HEADER_BYTES = 4096  # of a small graph's file, and chance
ID_BYTES = 8  # of a key's label
LINK_BYTES = 4  # of an edge, and of the number of them


@dataclass(frozen=True, slots=True)
class CentredGraph:
    """A graph over keys from which `mean [head_dim]` was taken off."""

    graph: Any  # hnswlib.Index
    mean: Floats


class HnswIndex(LibraryIndex):
    """hnswlib's graph over the keys' own inner products, blind to the queries'.

    Deviation from hnswlib's plain use: the keys' mean is taken off before they enter the graph and <q, mean>
    is added back to the scores. The order of the keys stays the same; but keys of a model share a large
    mean, and without this nearly all edges lead to the few keys that lie farthest along it.
    """

    kind = "hnsw"

    def __init__(
        self, keys: Tensor, queries: Tensor, m: int = M, ef_construction: int = 100, ef_search: int = 256
    ) -> None:
        """m: edges per key and layer (twice that at the bottom); ef_*: keys kept in view while building, searching."""
        super().__init__(keys, queries, m=m, ef_construction=ef_construction, ef_search=ef_search)

    def _create(self, vectors: Floats) -> CentredGraph:
        graph = hnswlib.Index("ip", vectors.shape[1])
        options = self._options
        graph.init_index(len(vectors), options["m"], options["ef_construction"], random_seed=1)
        graph.set_ef(options["ef_search"])
        structure = CentredGraph(graph, vectors.mean(axis=0))
        self._append(structure, vectors)
        return structure

    def _append(self, structure: CentredGraph, vectors: Floats) -> None:
        graph = structure.graph
        needed = graph.element_count + len(vectors)
        if needed > graph.max_elements:
            graph.resize_index(max(needed, graph.max_elements * 5 // 4))
        graph.add_items(vectors - structure.mean, num_threads=torch.get_num_threads())

    def _find(self, structure: CentredGraph, queries: Tensor, k: int, limit: int) -> tuple[Tensor, Tensor]:
        fetched = overfetch(k, limit, self.num_keys)
        vectors = as_floats(queries)
        try:
            labels, distances = structure.graph.knn_query(vectors, fetched, num_threads=torch.get_num_threads())
        except RuntimeError:  # fewer than `fetched` keys were reached for some query
            return empty_result(len(queries), k)
        scores = 1.0 - distances + (vectors @ structure.mean)[:, None]  # hnswlib's "distance" is 1 - <q, k>
        return drop_beyond(torch.from_numpy(labels.astype(np.int64)), torch.from_numpy(scores), limit, k)

    def _count_found(self, k: int, num_visible: int) -> int:
        # hnswlib does not say: at most all neighbours of every key that was in view.
        num_in_view = max(k, int(self._options["ef_search"]))
        return min(num_visible, num_in_view * 2 * int(self._options["m"]))

    @property
    def nbytes(self) -> int:
        """The float32 copy of the keys, and the edges."""
        return 0 if self._structure is None else int(self._structure.graph.index_file_size())

    @classmethod
    def most_bytes(cls, num_keys: int, head_dim: int, element_size: int, m: int = M, **options: Any) -> int:
        """See `KeyIndex.most_bytes`. One key in m is on the next layer up, about; twice as many are allowed for."""
        bottom_bytes = 4 * head_dim + ID_BYTES + LINK_BYTES * (2 * m + 1)
        upper_bytes = LINK_BYTES + 2 * LINK_BYTES * (m + 1) // max(1, m - 1)
        return num_keys * (bottom_bytes + upper_bytes) + HEADER_BYTES

    def _dump(self, structure: CentredGraph) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "graph"
            structure.graph.save_index(str(path))
            return structure.mean.tobytes() + path.read_bytes()

    def _restore(self, payload: bytes) -> CentredGraph:
        mean = np.frombuffer(payload, dtype=np.float32, count=self.head_dim)
        graph = hnswlib.Index("ip", self.head_dim)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "graph"
            path.write_bytes(payload[mean.nbytes :])
            graph.load_index(str(path))
        graph.set_ef(self._options["ef_search"])
        return CentredGraph(graph, mean)
