"""Attention of one packed row in one layer: writes K and V, splits the row by sequence, decodes and prefills.

All the rest of a model is token-wise, so this is the only place where sequences differ. Engine thread only.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from retrieval.context import Context, Run
from retrieval.decode import Decoder, DecodeRow, DecodeStats
from retrieval.methods import AttentionMethod
from retrieval.methods.base import clip_runs
from retrieval.prefill import attend_chunk


@dataclass(frozen=True, slots=True)
class Span:
    """A sequence's tokens in the packed row: `[row, row + num_tokens)`."""

    context: Context
    row: int
    num_tokens: int


@dataclass(slots=True)
class DecodeReport:
    """What decoding cost in one pass; filled by the attention function, over all layers."""

    stats: DecodeStats = field(default_factory=DecodeStats)
    seconds: float = 0.0
    keep_queries_of: int | None = None  # layer whose queries are kept, set by the runner
    kept_queries: Tensor | None = None  # [num_decodes, num_q_heads, head_dim]


class Step:
    """What the attention function needs for one forward pass: decode spans first, one token each."""

    def __init__(
        self,
        decodes: list[Span],
        prefills: list[Span],
        method: AttentionMethod,
        decoder: Decoder,
        report: DecodeReport | None = None,
    ) -> None:
        self.decodes, self.prefills = decodes, prefills
        self.method, self.decoder = method, decoder
        self.report = report or DecodeReport()
        self.is_quantized = any(span.context.tail.key_scales is not None for span in decodes)
        self._num_decoded_tokens = sum(span.context.num_tokens for span in decodes)
        self._rows: dict[int | None, list[DecodeRow]] = {}
        self._targets: list[list[Tensor]] | None = None

    def announce(self) -> None:
        """A layer's attention follows soon."""
        if self.decodes:
            self.decoder.announce(self._num_decoded_tokens)

    def split(self) -> list[tuple[Step, slice]]:
        """The decodes together and each prefill alone, with the rows of this step that they take; one report."""
        parts: list[tuple[Step, slice]] = []
        if self.decodes:
            together = Step(self.decodes, [], self.method, self.decoder, self.report)
            parts.append((together, slice(0, len(self.decodes))))
        for span in self.prefills:
            alone = Step([], [Span(span.context, 0, span.num_tokens)], self.method, self.decoder, self.report)
            parts.append((alone, slice(span.row, span.row + span.num_tokens)))
        return parts

    def rows(self, sliding_window: int | None) -> list[DecodeRow]:
        """What each decode token sees; the same in all layers of one window, so chosen once a step."""
        if sliding_window not in self._rows:
            self._rows[sliding_window] = [
                DecodeRow(s.context, self._select(s.context, sliding_window)) for s in self.decodes
            ]
        return self._rows[sliding_window]

    def targets(self, layer_idx: int) -> list[Tensor]:
        """Where the decode tokens' K, then their V go, each `[num_kv_heads, head_dim]`."""
        if self._targets is None:
            tails = [span.context.tail for span in self.decodes]
            views = [t.keys.select(2, t.length).unbind(0) for t in tails]
            views += [t.values.select(2, t.length).unbind(0) for t in tails]
            self._targets = [list(layer) for layer in zip(*views, strict=True)]
        return self._targets[layer_idx]

    def _select(self, context: Context, window: int | None) -> list[Run]:
        if window is not None and context.num_tokens + 1 > window:
            return clip_runs(context.runs(num_new=1), context.num_tokens + 1 - window)
        return self.method.select(context)


def attend_packed(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    layer_idx: int,
    scale: float,
    sliding_window: int | None,
    step: Step,
    out: Tensor | None = None,
) -> Tensor:
    """queries `[num_tokens, num_q_heads, head_dim]`, keys and values `[num_tokens, num_kv_heads, head_dim]`.

    Writes K and V to each context's tail (committed by the caller after the pass); returns the shape and
    dtype of the queries, in `out` where the caller has room for it and anything is prefilled.
    """
    if not step.prefills:
        return attend_decodes(queries, NewRows(keys, values), layer_idx, scale, sliding_window, step).to(queries.dtype)
    out = torch.empty_like(queries) if out is None else out
    if step.decodes:
        rows = slice(0, len(step.decodes))
        new = NewRows(keys[rows], values[rows])
        out[rows] = attend_decodes(queries[rows], new, layer_idx, scale, sliding_window, step)
    keys, values = keys.transpose(0, 1), values.transpose(0, 1)
    for span in step.prefills:
        rows = slice(span.row, span.row + span.num_tokens)
        span.context.tail.write(layer_idx, keys[:, rows], values[:, rows])
    for span in step.prefills:
        rows = slice(span.row, span.row + span.num_tokens)
        chunk = queries[rows].transpose(0, 1)
        step.method.observe(span.context, layer_idx, chunk)
        if span.context.online_codes is not None:
            tail = span.context.tail
            span.context.online_codes.extend(layer_idx, tail, tail.length + span.num_tokens, chunk)
        attend_chunk(chunk, span.context, layer_idx, scale, sliding_window, out[rows].transpose(0, 1))
    return out


class NewRows:
    """Keys and values `[num_decodes, num_kv_heads, head_dim]` of the decodes' own tokens in one layer."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.rows = [*keys.unbind(0), *values.unbind(0)]

    def write(self, layer_idx: int, step: Step) -> None:
        """Into the tails, in one call: one per row costs more than the rows."""
        if not step.is_quantized:
            torch._foreach_copy_(step.targets(layer_idx), self.rows)
            return
        num_decodes = len(step.decodes)
        for span, key, value in zip(step.decodes, self.rows, self.rows[num_decodes:], strict=False):
            span.context.tail.write(layer_idx, key[:, None], value[:, None])


def attend_decodes(
    queries: Tensor,
    new: NewRows,
    layer_idx: int,
    scale: float,
    window: int | None,
    step: Step,
    out: Tensor | None = None,
) -> Tensor:
    """As `attend_packed` for the step's decodes alone, one row each; float32 output, in `out` where it is given."""
    new.write(layer_idx, step)
    started = time.perf_counter()
    report = step.report
    if report.keep_queries_of == layer_idx:
        report.kept_queries = queries.clone()  # their memory may be used anew before they are looked at
    out = step.decoder.attend(queries, step.rows(window), layer_idx, scale, report.stats, out)
    report.seconds += time.perf_counter() - started
    return out
