"""Kind `roar`: the attention-aware graph (RetrievalAttention, arXiv 2409.10516; RoarGraph, arXiv 2408.08933).

Owns the exact lists of the sampled queries and the core's graph. Blind to what no sampled query looked for
(see `rabitq`, which is not). Any thread may call; inserts wait for searches. Needs the C++ core.
"""

from __future__ import annotations

import json
import struct
from itertools import pairwise
from typing import Any

from torch import Tensor

from retrieval import _core
from retrieval.index.base import check_vectors
from retrieval.index.flat import empty_result, exact_search
from retrieval.index.library import Floats, LibraryIndex

GRAPH_OPTIONS = ("degree", "num_pivots", "extra_degree", "link_width", "num_entries")


class RoarIndex(LibraryIndex):
    """Query-to-key lists projected to key-to-key edges; the queries themselves are dropped but for entry points."""

    kind = "roar"

    def __init__(
        self,
        keys: Tensor,
        queries: Tensor,
        list_size: int = 64,
        max_queries: int = 8192,
        ef_search: int = 256,
        degree: int = 32,
        num_pivots: int = 8,
        extra_degree: int = 8,
        link_width: int = 32,
        num_entries: int = 8,
    ) -> None:
        """queries `[num_queries, head_dim]` sampled during prefill, at most `max_queries` used, evenly spaced.

        list_size: exact neighbours per query. ef_search: keys in view while searching. The others: csrc/graph.h.
        """
        check_vectors("queries", queries, int(keys.shape[1]) if keys.ndim == 2 else None)
        self._queries = queries[:: max(1, -(-len(queries) // max_queries))]
        self._scored_per_query = float(ef_search * degree)  # until a search has said better
        super().__init__(
            keys, queries, list_size=list_size, max_queries=max_queries, ef_search=ef_search, degree=degree,
            num_pivots=num_pivots, extra_degree=extra_degree, link_width=link_width, num_entries=num_entries,
        )  # fmt: skip

    def _graph(self) -> Any:
        return _core.Graph(**{name: self._options[name] for name in GRAPH_OPTIONS})

    def _create(self, vectors: Floats) -> Any:
        graph, keys = self._graph(), self._keys.contiguous()
        queries = self._queries if len(self._queries) else keys[:: max(1, len(keys) // 1024)]
        lists, _ = exact_search(keys, queries, self._options["list_size"])
        graph.build(keys, queries.float().contiguous(), lists.int().contiguous())
        return graph

    def _append(self, structure: Any, vectors: Floats) -> None:
        structure.insert(self._keys.contiguous())

    def _find(self, structure: Any, queries: Tensor, k: int, limit: int) -> tuple[Tensor, Tensor]:
        positions, scores = empty_result(len(queries), k)
        width = max(k, int(self._options["ef_search"]))
        num_scored = structure.search(
            self._keys.contiguous(), queries.float().contiguous(), width, limit, positions, scores
        )
        self._scored_per_query = num_scored / len(queries)
        return positions, scores

    def _count_found(self, k: int, num_visible: int) -> int:
        """As many as the latest search scored per query."""
        return min(num_visible, round(self._scored_per_query))

    @property
    def nbytes(self) -> int:
        """Edges and entry points."""
        return 0 if self._structure is None else int(self._structure.nbytes)

    def _dump(self, structure: Any) -> bytes:
        parts = structure.save()
        header = json.dumps({"num_keys": structure.num_keys, "sizes": [len(part) for part in parts]}).encode()
        return struct.pack("<I", len(header)) + header + b"".join(parts)

    def _restore(self, payload: bytes) -> Any:
        (length,) = struct.unpack_from("<I", payload)
        header = json.loads(payload[4 : 4 + length])
        bounds = [4 + length]
        for size in header["sizes"]:
            bounds.append(bounds[-1] + size)
        graph = self._graph()
        graph.restore(*(payload[a:b] for a, b in pairwise(bounds)), header["num_keys"], self.head_dim)
        return graph
