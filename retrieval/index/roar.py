"""Kind `roar`: the attention-aware graph (RetrievalAttention, arXiv 2409.10516; RoarGraph, arXiv 2408.08933).

Owns the exact lists of the sampled queries and the core's graph. Blind to what no sampled query looked for
(see `rabitq`, which is not). Any thread may call; inserts wait for searches. Needs the C++ core.
"""

from __future__ import annotations

import json
import struct
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from retrieval import _core
from retrieval.index.base import AttendStats, attend_positions, check_vectors
from retrieval.index.flat import empty_result
from retrieval.index.library import Floats, LibraryIndex

GRAPH_OPTIONS = ("degree", "num_linked", "num_pivots", "extra_degree", "link_width", "num_voters", "start_share")
LIST_SIZE = 512
MAX_QUERIES = 8192
WIDTHS = (100, 125, 150, 175, 200, 250, 300, 350, 400, 500, 600)
NUM_CHECKS = 64  # sampled queries kept out of the graph to find that width
CHECKED = 100  # best keys that those must find
WANTED_RECALL = 0.98  # share of them found; the end of a prompt asks a little otherwise than the rest did
LISTED_PER_KEY = 64  # entries of lists: short contexts need fewer and shorter ones, and the bytes follow
QUERY_BLOCK = 64  # queries whose full rows of scores are held at a time
RUN = 32  # keys whose best score stands for them


class RoarIndex(LibraryIndex):
    """Query-to-key lists projected to key-to-key edges; the lists stay and vote for where a search begins.

    A new query is made up of the sampled queries most like it, by ridge regression, and so are its scores: a key's
    votes are what those queries' lists say about it, weighted so. Best-first search then follows the edges.
    """

    kind = "roar"

    def __init__(
        self,
        keys: Tensor,
        queries: Tensor,
        list_size: int = LIST_SIZE,
        max_queries: int = MAX_QUERIES,
        ef_search: int | None = None,
        max_share: float = 0.03,
        degree: int = 16,
        num_linked: int = 100,
        num_pivots: int = 16,
        extra_degree: int = 16,
        link_width: int = 32,
        num_voters: int = 64,
        start_share: int = 64,
    ) -> None:
        """queries `[num_queries, head_dim]` sampled during prefill, at most `max_queries` used, evenly spaced.

        list_size: exact neighbours per query that vote for where a search begins; the first `num_linked` become
        edges. ef_search: keys in view while searching; if not given, as many as some of the sampled queries, kept out
        of the graph, need for their best 100, as long as no more than `max_share` of the keys are scored. The others:
        csrc/graph.h.
        """
        check_vectors("queries", queries, int(keys.shape[1]) if keys.ndim == 2 else None)
        self._queries = queries[:: max(1, -(-len(queries) // max_queries))]
        self._width = ef_search or WIDTHS[0]
        self._scored_per_query = float(self._width * degree)  # until a search has said better
        self._last_hits: list[list[int]] = []  # of the latest `attend`, per row
        super().__init__(
            keys, queries, list_size=list_size, max_queries=max_queries, ef_search=ef_search, max_share=max_share,
            degree=degree, num_linked=num_linked, num_pivots=num_pivots, extra_degree=extra_degree,
            link_width=link_width, num_voters=num_voters, start_share=start_share,
        )  # fmt: skip

    def _graph(self) -> Any:
        return _core.Graph(**{name: self._options[name] for name in GRAPH_OPTIONS})

    def _create(self, vectors: Floats) -> Any:
        graph, keys = self._graph(), self._keys.contiguous()
        queries = self._queries if len(self._queries) else keys[:: max(1, len(keys) // 1024)]
        list_size, stride = fit_lists(len(queries), self._options["list_size"], len(keys))
        queries = queries[::stride]
        lists = exact_lists(torch.from_numpy(vectors), queries, max(list_size, CHECKED))
        is_check = torch.zeros(len(queries), dtype=torch.bool)
        if self._options["ef_search"] is None and len(queries) >= 8 * NUM_CHECKS:
            is_check[:: len(queries) // NUM_CHECKS] = True
        used = lists[~is_check, :list_size]
        graph.build(keys, queries[~is_check].float().contiguous(), used.int().contiguous())
        if is_check.any():
            self._width = self._find_width(graph, queries[is_check].float().contiguous(), lists[is_check, :CHECKED])
        return graph

    def _find_width(self, graph: Any, queries: Tensor, expected: Tensor) -> int:
        """The least of `WIDTHS` that finds `WANTED_RECALL` of the lists `expected [num_queries, CHECKED]`, or the
        widest that scores no more keys than allowed."""
        found, most = WIDTHS[0], self._options["max_share"] * self.num_keys * len(queries)
        for width in WIDTHS:
            positions, scores = empty_result(len(queries), CHECKED)
            num_scored, _ = graph.search(self._keys.contiguous(), queries, width, self.num_keys, positions, scores)
            if num_scored > most:
                break
            found = width
            if (expected[:, :, None] == positions[:, None, :]).any(dim=2).float().mean() >= WANTED_RECALL:
                break
        return found

    def _append(self, structure: Any, vectors: Floats) -> None:
        structure.insert(self._keys.contiguous())

    def _find(self, structure: Any, queries: Tensor, k: int, limit: int) -> tuple[Tensor, Tensor]:
        positions, scores = empty_result(len(queries), k)
        hints = self._last_hits if len(self._last_hits) == len(queries) else []
        num_scored, _ = structure.search(
            self._keys.contiguous(), queries.float().contiguous(), max(k, self._width), limit, positions, scores, hints
        )
        self._scored_per_query = num_scored / len(queries)
        return positions, scores

    def attend(
        self, queries: Tensor, values: Tensor, k: int, scale: float, limit: int | None = None
    ) -> tuple[Tensor, Tensor, AttendStats]:
        """See `KeyIndex.attend`. The next search of as many rows also begins with what this one found: the next
        token of a sequence asks for much the same."""
        positions, scores = self.search(queries, k, limit)
        self._last_hits = [row[row >= 0].tolist() for row in positions]
        out, lse = attend_positions(positions, scores, values, scale)
        visible = len(self._keys[:limit])
        num_scored = self.count_scored(len(queries), k, visible)
        return out, lse, AttendStats(len(queries), visible, num_scored, int((positions >= 0).sum()))

    def _count_found(self, k: int, num_visible: int) -> int:
        """As many as the latest search scored per query."""
        return min(num_visible, round(self._scored_per_query))

    @property
    def nbytes(self) -> int:
        """Edges, sampled queries and their lists."""
        return 0 if self._structure is None else int(self._structure.nbytes)

    @classmethod
    def most_bytes(
        cls,
        num_keys: int,
        head_dim: int,
        element_size: int,
        list_size: int = LIST_SIZE,
        max_queries: int = MAX_QUERIES,
        **options: Any,
    ) -> int:
        """See `KeyIndex.most_bytes`; `fit_lists` says how many lists of what length there may be."""
        longest = max(list_size, CHECKED)
        num_listed = min(LISTED_PER_KEY * num_keys, max_queries * longest) + longest
        graph = _core.Graph(**{name: value for name, value in options.items() if name in GRAPH_OPTIONS})
        return graph.most_bytes(num_keys, head_dim, min(max_queries, num_listed // CHECKED), num_listed)

    def _dump(self, structure: Any) -> bytes:
        parts = structure.save()
        header = json.dumps(
            {"num_keys": structure.num_keys, "width": self._width, "sizes": [len(part) for part in parts]}
        ).encode()
        return struct.pack("<I", len(header)) + header + b"".join(parts)

    def _restore(self, payload: bytes) -> Any:
        (length,) = struct.unpack_from("<I", payload)
        header = json.loads(payload[4 : 4 + length])
        self._width = int(header["width"])
        bounds = [4 + length]
        for size in header["sizes"]:
            bounds.append(bounds[-1] + size)
        graph = self._graph()
        graph.restore(*(payload[a:b] for a, b in pairwise(bounds)), header["num_keys"], self.head_dim)
        return graph


def fit_lists(num_queries: int, list_size: int, num_keys: int) -> tuple[int, int]:
    """How long lists may be over so few keys, and which queries get one (every so manieth): `LISTED_PER_KEY`."""
    room = LISTED_PER_KEY * num_keys
    list_size = min(list_size, max(CHECKED, room // max(1, num_queries)))
    return list_size, max(1, -(-num_queries * list_size // room))


def exact_lists(keys: Tensor, queries: Tensor, list_size: int) -> Tensor:
    """The best `list_size` keys of each query, best first, -1 where there are none: int64 `[num_queries, list_size]`.

    A run of keys can hold one of the best only if its own best is among the best of the runs, so all but that many
    runs are put aside before anything is sorted.
    """
    lists = torch.full((len(queries), list_size), -1)
    num_found, whole = min(list_size, len(keys)), len(keys) // RUN * RUN
    for start in range(0, len(queries), QUERY_BLOCK):
        scores = queries[start : start + QUERY_BLOCK].float() @ keys.T  # [block, num_keys]
        if whole // RUN <= 2 * num_found:
            lists[start : start + QUERY_BLOCK, :num_found] = scores.topk(num_found, dim=1).indices
            continue
        runs = scores[:, :whole].reshape(len(scores), -1, RUN)
        best = runs.amax(dim=2).topk(num_found, dim=1).indices  # [block, num_found]
        rows = torch.arange(len(scores))[:, None]
        kept = torch.cat((runs[rows, best].flatten(1), scores[:, whole:]), dim=1)
        places = torch.cat(
            (
                (best[:, :, None] * RUN + torch.arange(RUN)).flatten(1),
                torch.arange(whole, len(keys)).expand(len(scores), -1),
            ),
            dim=1,
        )
        lists[start : start + QUERY_BLOCK, :num_found] = places.gather(1, kept.topk(num_found, dim=1).indices)
    return lists
