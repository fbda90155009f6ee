"""Who is compared: torch's attention, the index kinds head by head, and the core's whole-layer call.

All get the same keys: the first `num_sink` and the last `window` are the static set, attended exactly as in the
server; what lies between is indexed.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from retrieval.balance import balance
from retrieval.index import build
from retrieval.index.base import attend_positions
from retrieval.index.flat import rescore
from retrieval.merge import Partial, merge
from retrieval.native import Lent
from retrieval.partial_attention import attend_grouped
from scripts.bench.index_bench.layers import Layer, served


@dataclass(frozen=True, slots=True)
class Plan:
    """What is the same for all contestants."""

    num_retrieved: int
    num_sink: int
    window: int


@dataclass(slots=True)
class Cost:
    """Sums over queries of what retrieval read."""

    num_queries: int = 0
    num_scored: int = 0
    num_retrieved: int = 0
    bytes_read: int = 0


class Contestant(ABC):
    """One way to compute a layer's decode attention, built over one layer."""

    def __init__(self, layer: Layer, plan: Plan) -> None:
        self.layer, self.plan, self.cost = layer, plan, Cost()
        self.indexed = slice(plan.num_sink, layer.keys.shape[1] - plan.window)
        keys, values = layer.keys, layer.values
        static = torch.cat((torch.arange(self.indexed.start), torch.arange(self.indexed.stop, keys.shape[1])))
        self.static_keys, self.static_values = keys[:, static].contiguous(), values[:, static].contiguous()
        started = time.perf_counter()
        self.build()
        self.build_seconds = time.perf_counter() - started

    @abstractmethod
    def build(self) -> None:
        """Whatever has to be ready before the first query."""

    @abstractmethod
    def retrieve(self, queries: Tensor) -> Partial | None:
        """Attention of `[num_q_heads, d]` over the retrieved keys alone, counted in `cost`; None if all are exact."""

    @abstractmethod
    def step(self, queries: Tensor) -> Tensor:
        """A whole decode step of the layer, `[num_q_heads, d]` to float32 `[num_q_heads, d]`: what is timed."""

    def search(self, queries: Tensor, k: int) -> Tensor | None:
        """Positions among the indexed keys `[num_q_heads, n, k]` of queries `[num_q_heads, n, d]`, if it can say."""
        return None

    @property
    def nbytes(self) -> int:
        """Bytes besides K and V."""
        return 0

    def attend_static(self, queries: Tensor) -> Partial:
        """Exact attention of `[num_q_heads, d]` over sink and window."""
        out, lse = attend_grouped(queries[:, None], self.static_keys, self.static_values, self.layer.scale)
        return out[:, 0], lse[:, 0]


class Sdpa(Contestant):
    """torch's scaled_dot_product_attention over all keys; `grouped` folds a group's heads into one row block."""

    def __init__(self, layer: Layer, plan: Plan, grouped: int = 0) -> None:
        self.grouped = bool(grouped)
        super().__init__(layer, plan)

    def build(self) -> None:
        """Nothing."""

    def retrieve(self, queries: Tensor) -> None:
        """All keys are attended."""

    def step(self, queries: Tensor) -> Tensor:
        keys, values, scale = self.layer.keys, self.layer.values, self.layer.scale
        if self.grouped:
            return attend_grouped(queries[:, None], keys, values, scale)[0][:, 0]
        q = queries[None, :, None]
        return scaled_dot_product_attention(q, keys[None], values[None], scale=scale, enable_gqa=True)[0, :, 0].float()


class PerHead(Contestant):
    """One index kind through the contract, one Python call per KV head."""

    def __init__(self, layer: Layer, plan: Plan, kind: str, **options: Any) -> None:
        self.kind, self.options = kind, options
        super().__init__(layer, plan)

    def build(self) -> None:
        train = self.layer.grouped(self.layer.train)
        self.indexes = [
            build(self.kind, keys[self.indexed], queries, **self.options)
            for keys, queries in zip(self.layer.keys, train, strict=True)
        ]

    def retrieve(self, queries: Tensor) -> Partial:
        k, scale, parts = self.plan.num_retrieved, self.layer.scale, []
        for index, group, values in zip(
            self.indexes, self.layer.grouped(queries[:, None]), self.layer.values, strict=True
        ):
            out, lse, stats = index.attend(group, values[self.indexed], k, scale)
            parts.append((out, lse))
            self.cost.num_queries += stats.num_queries
            self.cost.num_scored += stats.num_scored
            self.cost.num_retrieved += stats.num_retrieved
            self.cost.bytes_read += index.count_bytes_read(stats.num_queries, k, stats.num_keys)
            self.cost.bytes_read += stats.num_retrieved * values.shape[1] * values.element_size()
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])

    def step(self, queries: Tensor) -> Tensor:
        return merge([self.attend_static(queries), self.retrieve(queries)])[0]

    def search(self, queries: Tensor, k: int) -> Tensor:
        grouped = self.layer.grouped(queries)
        found = [index.search(rows, k)[0] for index, rows in zip(self.indexes, grouped, strict=True)]
        return torch.stack(found).reshape(*queries.shape[:2], k)

    @property
    def nbytes(self) -> int:
        return sum(index.nbytes for index in self.indexes)


class FaissRabitq(Contestant):
    """faiss's IndexRaBitQFastScan head by head, a fixed number of its best rescored exactly: the library to beat.

    Keys are rotated before they are encoded, as faiss advises; it centres them itself. bits: planes per dimension,
    as many bytes as `rabitq` of as many.
    """

    def __init__(self, layer: Layer, plan: Plan, bits: int = 2, num_rescored: int = 500) -> None:
        self.bits, self.num_rescored = bits, num_rescored
        super().__init__(layer, plan)

    def build(self) -> None:
        import faiss

        head_dim = self.layer.keys.shape[2]
        self.indexes = []
        for keys in self.layer.keys:
            codes = faiss.IndexRaBitQFastScan(head_dim, faiss.METRIC_INNER_PRODUCT, 32, self.bits)
            index = faiss.IndexPreTransform(faiss.RandomRotationMatrix(head_dim, head_dim), codes)
            vectors = keys[self.indexed].float().contiguous().numpy()
            index.train(vectors)
            index.add(vectors)
            self.indexes.append(index)

    def find(self, head: int, group: Tensor, k: int) -> tuple[Tensor, Tensor]:
        _, candidates = self.indexes[head].search(group.float().numpy(), max(k, self.num_rescored))
        return rescore(self.layer.keys[head, self.indexed], group, torch.from_numpy(candidates), k)

    def retrieve(self, queries: Tensor) -> Partial:
        parts, num_indexed = [], self.indexed.stop - self.indexed.start
        for head, (group, values) in enumerate(
            zip(self.layer.grouped(queries[:, None]), self.layer.values, strict=True)
        ):
            positions, scores = self.find(head, group, self.plan.num_retrieved)
            parts.append(attend_positions(positions, scores, values[self.indexed], self.layer.scale))
            num_scored, num_retrieved = len(group) * min(self.num_rescored, num_indexed), int((positions >= 0).sum())
            self.cost.num_queries += len(group)
            self.cost.num_scored += num_scored
            self.cost.num_retrieved += num_retrieved
            row_bytes = values.shape[1] * values.element_size()
            self.cost.bytes_read += (num_scored + num_retrieved) * row_bytes + len(group) * self.code_bytes
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])

    def step(self, queries: Tensor) -> Tensor:
        return merge([self.attend_static(queries), self.retrieve(queries)])[0]

    def search(self, queries: Tensor, k: int) -> Tensor:
        grouped = self.layer.grouped(queries)
        found = torch.stack([self.find(head, rows, k)[0] for head, rows in enumerate(grouped)])
        return found.reshape(*queries.shape[:2], k)

    @property
    def code_bytes(self) -> int:
        """Codes of one head: planes, and faiss's factors per key."""
        import faiss

        codes = faiss.downcast_index(self.indexes[0].index)
        return int(codes.codes.size() if hasattr(codes.codes, "size") else len(codes.codes))

    @property
    def nbytes(self) -> int:
        return len(self.indexes) * self.code_bytes


class Core(Contestant):
    """The core's `DecodeRows.attend`: all heads in one native call, over codes (`bits`) or, with bits=0, exactly."""

    def __init__(self, layer: Layer, plan: Plan, bits: int = 2, **budget: Any) -> None:
        from retrieval import _core

        self.core, self.bits, self.budget = _core, bits, _core.Budget(**budget)
        super().__init__(layer, plan)

    def build(self) -> None:
        keys, values, indexed = self.layer.keys, self.layer.values, self.indexed
        held_keys, held_values = served(keys[:, indexed], values[:, indexed])
        self.codes = None
        if self.bits:
            # As online: from the first chunk's keys; its queries are too few here, so from those of the whole prompt.
            maps = balance(held_keys[:, :2048], self.layer.train, self.bits) or ()
            self.codes = self.core.LayerCodes(keys.shape[0], keys.shape[2], self.bits, 0, *maps)
            self.codes.append(held_keys)
        count = held_keys.shape[1]
        self.searched = [self.core.Part(held_keys, held_values, 0, count, self.codes)]
        static = self.core.Part(self.static_keys, self.static_values, 0, self.static_keys.shape[1])
        self.everything = [static, *self.searched]
        # As the server's decode pass, which computes in the same memory step by step.
        num_q_heads, dtype = len(self.layer.train), self.layer.asked["later"].dtype
        self.queries = torch.empty(num_q_heads, keys.shape[2], dtype=dtype)
        self.out, self.lse = torch.empty(num_q_heads, keys.shape[2]), torch.empty(num_q_heads)
        self.rows = self.core.DecodeRows(Lent(self.queries[None]), Lent(self.out[None]), Lent(self.lse[None]))

    def attend(self, queries: Tensor, parts: list[Any]) -> Any:
        """Fills `out` and `lse`, until the next call."""
        self.queries.copy_(queries)
        return self.rows.attend([parts], self.layer.scale, self.budget)

    def retrieve(self, queries: Tensor) -> Partial:
        stats = self.attend(queries, self.searched)
        self.cost.num_queries += len(queries)
        self.cost.num_scored += stats.num_scored
        self.cost.num_retrieved += stats.num_retrieved if self.bits else stats.num_visible
        self.cost.bytes_read += stats.bytes_read
        return self.out, self.lse

    def step(self, queries: Tensor) -> Tensor:
        self.attend(queries, self.everything)
        return self.out

    @property
    def nbytes(self) -> int:
        return 0 if self.codes is None else int(self.codes.nbytes)


def make(spec: str, layer: Layer, plan: Plan) -> Contestant:
    """The contestant that `spec` names: `kind` or `kind:option=value,option=value`."""
    name, _, tail = spec.partition(":")
    options = {key: parse(value) for key, _, value in (item.partition("=") for item in tail.split(",") if item)}
    if name == "sdpa":
        return Sdpa(layer, plan, **options)
    if name == "faiss_rabitq":
        return FaissRabitq(layer, plan, **options)
    if name == "core":
        return Core(layer, plan, **options)
    return PerHead(layer, plan, name, **options)


def parse(value: str) -> int | float | str:
    """A number where it is one."""
    for convert in (int, float):
        try:
            return convert(value)
        except ValueError:
            pass
    return value
