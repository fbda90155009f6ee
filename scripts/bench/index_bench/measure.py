"""What is measured of a contestant: how good its attention is, and how long a decode step of a layer takes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from retrieval.index.flat import inner_products
from retrieval.merge import merge
from scripts.bench.index_bench.contestants import Contestant, Cost
from scripts.bench.index_bench.layers import Layer

TOP = 100  # of recall@100 and of captured mass
WARM_UP = 3


@dataclass(frozen=True, slots=True)
class Truth:
    """Exact answers to the queries of one set and layer, float32."""

    top: Tensor  # [num_q_heads, rows, TOP] positions among the indexed keys
    top_lse: Tensor  # [num_q_heads, rows] log of the softmax mass of those
    out: Tensor  # [num_q_heads, rows, d] attention over all keys, static set included


@dataclass(slots=True)
class Result:
    """One contestant on one set of queries; lists grow layer by layer."""

    name: str
    recall: list[Tensor] = field(default_factory=list)  # per query
    mass: list[Tensor] = field(default_factory=list)
    error: list[Tensor] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)  # of all threads, per step; one mean per layer
    build_seconds: list[float] = field(default_factory=list)  # per layer
    nbytes: list[int] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)
    num_visible: int = 0  # query-key pairs that a full scan of the indexed keys would score


def exact_answers(layer: Layer, queries: Tensor, indexed: slice) -> Truth:
    """The oracle, one KV head at a time: `queries [num_q_heads, rows, d]`."""
    tops, lses, outs = [], [], []
    for keys, values, rows in zip(layer.keys, layer.values, layer.grouped(queries), strict=True):
        scores = inner_products(rows, keys)
        top = scores[:, indexed].topk(min(TOP, indexed.stop - indexed.start), dim=1)
        tops.append(top.indices)
        lses.append(torch.logsumexp(top.values * layer.scale, dim=1))
        outs.append(torch.softmax(scores * layer.scale, dim=1) @ values.float())
    shape = queries.shape[:2]
    return Truth(
        torch.cat(tops).reshape(*shape, -1), torch.cat(lses).reshape(shape), torch.cat(outs).reshape(queries.shape)
    )


def measure_quality(contestant: Contestant, queries: Tensor, truth: Truth, result: Result) -> None:
    """Row by row, as decoding would ask: recall, captured mass, error of the whole attention output.

    Captured mass of a query: softmax mass of the keys it retrieved over that of the exact top 100, at most 1.
    """
    contestant.cost = result.cost
    masses, errors = [], []
    for row in range(queries.shape[1]):
        q = queries[:, row].contiguous()
        part = contestant.retrieve(q)
        if part is None:
            out = contestant.step(q)
        else:
            out = merge([contestant.attend_static(q), part])[0]
            masses.append((part[1] - truth.top_lse[:, row]).exp().clamp(max=1.0))
        expected = truth.out[:, row]
        errors.append((out - expected).norm(dim=1) / expected.norm(dim=1))
    result.error.append(torch.cat(errors))
    num_indexed = contestant.indexed.stop - contestant.indexed.start
    if masses:
        result.mass.append(torch.cat(masses))
        result.num_visible += queries.shape[0] * queries.shape[1] * num_indexed
    found = contestant.search(queries, TOP)
    if found is not None:
        result.recall.append(recall(found, truth.top).flatten())


def recall(found: Tensor, expected: Tensor) -> Tensor:
    """Share of `expected [..., n]` within `found [..., k]`, per query; row by row to bound memory."""
    return torch.stack(
        [torch.isin(e, f).float().mean() for f, e in zip(found.flatten(0, 1), expected.flatten(0, 1), strict=True)]
    )


def measure_speed(contestant: Contestant, queries: Tensor, num_repeats: int, result: Result) -> None:
    """Time `num_repeats` decode steps of the layer, each with another row of queries."""
    contestant.cost = Cost()
    cpu_started = 0.0
    for i in range(-WARM_UP, num_repeats):
        if i == 0:
            cpu_started = time.process_time()
        q = queries[:, i % queries.shape[1]].contiguous()
        started = time.perf_counter()
        contestant.step(q)
        if i >= 0:
            result.step_seconds.append(time.perf_counter() - started)
    result.cpu_seconds.append((time.process_time() - cpu_started) / max(1, num_repeats))
