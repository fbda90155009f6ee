"""Attention of one decode token per sequence over its selected runs, merged exactly in float32.

Two decoders behind one interface: `NativeDecoder` hands a whole layer of a whole batch to the C++ core;
`TorchDecoder`, its twin and the way of a machine without the core, goes run by run. Indexes of the contract (one per KV
head) are attended one by one in both. Runs on a device are attended there; only `(out, lse)` travel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrieval.context import Context, Run
from retrieval.merge import Partial, empty_partial, merge
from retrieval.native import Lent
from retrieval.partial_attention import attend_grouped
from retrieval.segment_index import CodesIndex

ANNOUNCED_TOKENS = 2048  # from here on, waiting for a thread that sleeps costs more than the time it looks out for work


@dataclass(slots=True)
class DecodeStats:
    """Counts over (sequence, layer, query head): keys visible, scored exactly, retrieved into the output."""

    num_visible: int = 0
    num_scored: int = 0
    num_retrieved: int = 0

    def add(self, visible: int, scored: int, retrieved: int) -> None:
        """Count one part."""
        self.num_visible += visible
        self.num_scored += scored
        self.num_retrieved += retrieved


@dataclass(slots=True)
class DecodeRow:
    """One sequence's decode token: what it sees in one kind of layer. Lives for one step."""

    context: Context
    runs: list[Run]
    bound: BoundRow | None = None  # owned by the decoder, the same in all layers


@dataclass(frozen=True, slots=True)
class BoundRow:
    """A row's runs as the core takes them, `layers[layer]`, and those that it cannot attend."""

    layers: list[list[Any]]
    others: list[Run]


class Decoder(ABC):
    """Attends one token of each sequence in one layer."""

    has_own_threads: ClassVar[bool] = False  # its speed does not hang on torch's number of threads

    def __init__(self, num_retrieved: int) -> None:
        self._num_retrieved = num_retrieved

    def announce(self, num_tokens: int) -> None:  # noqa: B027 - most have nothing to do
        """`attend` follows soon, over that many tokens in all; a decoder with threads of its own may wake them."""

    @abstractmethod
    def attend(
        self,
        queries: Tensor,
        rows: list[DecodeRow],
        layer_idx: int,
        scale: float,
        stats: DecodeStats,
        out: Tensor | None = None,
    ) -> Tensor:
        """queries `[num_seqs, num_q_heads, head_dim]`, one row each; float32 output of the same shape, in `out` where
        it is given, which is in host memory."""

    def _attend_run(self, queries: Tensor, run: Run, layer_idx: int, scale: float, stats: DecodeStats) -> Partial:
        """One run of one sequence, on the run's own device: queries `[num_q_heads, head_dim]`."""
        if run.indexed is not None:
            return self._attend_heads(queries, run, layer_idx, scale, stats)
        count = (run.end - run.begin) * queries.shape[0]
        stats.add(count, count, count)
        keys = run.kv.read_keys(layer_idx, run.begin, run.end)
        values = run.kv.read_values(layer_idx, run.begin, run.end)
        local = queries.to(device=keys.device, dtype=keys.dtype)
        out, lse = attend_grouped(local[:, None], keys, values, scale)
        return out[:, 0].to(queries.device), lse[:, 0].to(queries.device)

    def _attend_heads(self, queries: Tensor, run: Run, layer_idx: int, scale: float, stats: DecodeStats) -> Partial:
        """Search a segment's index of each KV head up to the run's end: queries `[num_q_heads, head_dim]`."""
        assert run.indexed is not None
        index = run.indexed.index
        values = run.kv.read_values(layer_idx, 0, run.end)
        grouped = queries.to("cpu").reshape(values.shape[0], -1, values.shape[-1])  # [num_kv_heads, group, d]
        outs, lses = [], []
        for kv_head in range(values.shape[0]):
            head_index, head_values = index.head(layer_idx, kv_head), values[kv_head, index.begin :]
            out, lse, cost = head_index.attend(
                grouped[kv_head], head_values, self._num_retrieved, scale, run.end - index.begin
            )
            stats.add(cost.num_keys * cost.num_queries, cost.num_scored, cost.num_retrieved)
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs).to(queries.device), torch.cat(lses).to(queries.device)


class TorchDecoder(Decoder):
    """Run by run with torch: the oracle of the native decoder, and what serves without the core."""

    def attend(
        self,
        queries: Tensor,
        rows: list[DecodeRow],
        layer_idx: int,
        scale: float,
        stats: DecodeStats,
        out: Tensor | None = None,
    ) -> Tensor:
        """As `Decoder.attend`."""
        attended = [
            self._attend_row(q, row.runs, layer_idx, scale, stats) for q, row in zip(queries, rows, strict=True)
        ]
        return torch.stack(attended, out=out)

    def _attend_row(self, queries: Tensor, runs: list[Run], layer_idx: int, scale: float, stats: DecodeStats) -> Tensor:
        found = [self._attend_run(queries, run, layer_idx, scale, stats) for run in runs]
        return merge([empty_partial(tuple(queries.shape), queries.device), *found])[0]


@dataclass(slots=True)
class _BoundParts:
    """A context's runs as the core's parts, `layers[layer]`, valid while `signature` holds."""

    signature: tuple[Any, ...]
    layers: list[list[Any]]
    ranges: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class _LentRows:
    """The tensors of a call, and the core's hold on them."""

    queries: Tensor
    out: Tensor
    lse: Tensor
    core_rows: Any


class NativeDecoder(Decoder):
    """The C++ core's `DecodeRows.attend`: all runs in host memory, exact or behind layer codes, in one call."""

    has_own_threads = True

    def __init__(self, num_retrieved: int, core: Any, budget: Any) -> None:
        super().__init__(num_retrieved)
        self._core, self._budget = core, budget
        self._lent: _LentRows | None = None

    def announce(self, num_tokens: int) -> None:
        """As `Decoder.announce`; waking pays where the work is long."""
        if num_tokens >= ANNOUNCED_TOKENS:
            self._core.wake()

    def attend(
        self,
        queries: Tensor,
        rows: list[DecodeRow],
        layer_idx: int,
        scale: float,
        stats: DecodeStats,
        out: Tensor | None = None,
    ) -> Tensor:
        """As `Decoder.attend`."""
        bound = [row.bound or self._bind_row(row) for row in rows]
        lent = self._lend(queries, out)
        cost = lent.core_rows.attend([row.layers[layer_idx] for row in bound], scale, self._budget)
        stats.add(cost.num_visible, cost.num_scored, cost.num_retrieved)
        out, lse = lent.out, lent.lse
        if not queries.is_cpu:
            out, lse = out.to(queries.device), lse.to(queries.device)
        for i, row in enumerate(bound):
            if row.others:
                others = [self._attend_run(queries[i], run, layer_idx, scale, stats) for run in row.others]
                out[i] = merge([(out[i], lse[i]), *others])[0]
        return out

    def _lend(self, queries: Tensor, out: Tensor | None) -> _LentRows:
        """Made anew unless the caller computes in the tensors of its last call."""
        lent = self._lent
        if lent is None or lent.queries is not queries or lent.out is not out:
            host = queries if queries.is_cpu else queries.cpu()
            if host.stride()[1:] != (host.shape[2], 1):
                host = host.contiguous()
            out = torch.empty(host.shape) if out is None else out
            lse = torch.empty(host.shape[:-1])
            lent = _LentRows(queries, out, lse, self._core.DecodeRows(Lent(host), Lent(out), Lent(lse)))
            # What is in a copy would be old.
            self._lent = lent if host is queries else None
        return lent

    def _bind_row(self, row: DecodeRow) -> BoundRow:
        others = [run for run in row.runs if not _is_native(run)]
        row.bound = BoundRow(self._parts(row.context, self._joined(row.runs)), others)
        return row.bound

    def _joined(self, runs: list[Run]) -> list[Run]:
        """Where the core would attend so few keys exactly anyway, the pieces of a buffer as one run."""
        num_searched = sum([run.end - run.begin for run in runs if run.indexed is not None])
        if num_searched == 0 or self._budget.k > 0 or num_searched >= self._budget.exact_keys:
            return runs
        joined: list[Run] = []
        for run in runs:
            last = joined[-1] if joined else None
            if not _is_native(run):
                joined.append(run)
            elif last is not None and last.kv is run.kv and last.end == run.begin and _is_native(last):
                joined[-1] = Run(run.kv, last.begin, run.end)
            else:
                joined.append(Run(run.kv, run.begin, run.end))
        return joined

    def _parts(self, context: Context, runs: list[Run]) -> list[list[Any]]:
        """Parts of all layers; between steps mostly only ranges move, so the parts themselves are kept."""
        native = [run for run in runs if _is_native(run)]
        signature = tuple((id(run.kv), run.kv.keys.data_ptr(), id(run.indexed)) for run in native)
        bound: _BoundParts | None = context.decode_cache
        if bound is None or bound.signature != signature:
            layers = [[self._bind(run, layer) for run in native] for layer in range(context.geometry.num_layers)]
            bound = context.decode_cache = _BoundParts(signature, layers, [(r.begin, r.end) for r in native])
            return bound.layers
        for i, run in enumerate(native):
            if bound.ranges[i] != (run.begin, run.end):
                bound.ranges[i] = (run.begin, run.end)
                for parts in bound.layers:
                    parts[i].begin = 0  # so that no order of ends and begins is refused half-way
                    parts[i].end, parts[i].begin = run.end, run.begin
        return bound.layers

    def _bind(self, run: Run, layer_idx: int) -> Any:
        codes = run.indexed.index.codes(layer_idx) if run.indexed is not None else None
        scales = [None if t is None else t[layer_idx] for t in (run.kv.key_scales, run.kv.value_scales)]
        return self._core.Part(run.kv.keys[layer_idx], run.kv.values[layer_idx], run.begin, run.end, codes, *scales)


def _is_native(run: Run) -> bool:
    """In host memory, and exact or indexed by layer codes."""
    return run.kv.device.type == "cpu" and (run.indexed is None or isinstance(run.indexed.index, CodesIndex))
