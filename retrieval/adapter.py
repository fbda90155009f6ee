"""The one patch point on transformers: an attention function and a mask function under one name.

Registered by an explicit call. The step's state arrives as the forward keyword argument `step`, beside
`position_ids`; layers never see each other's sequences because this function splits the packed row.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig

from retrieval.context import Context, Run
from retrieval.decode import Decoder, DecodeRow, DecodeStats
from retrieval.geometry import Geometry
from retrieval.methods import AttentionMethod
from retrieval.methods.base import clip_runs
from retrieval.prefill import attend_chunk

ATTENTION_NAME = "retrieval"


class UnsupportedModelError(ValueError):
    """A model whose attention this project does not implement."""


@dataclass(frozen=True, slots=True)
class Span:
    """A sequence's tokens in the packed row: `[row, row + num_tokens)`."""

    context: Context
    row: int
    num_tokens: int


class Step:
    """What the attention function needs for one forward pass: decode spans first, one token each."""

    def __init__(self, decodes: list[Span], prefills: list[Span], method: AttentionMethod, decoder: Decoder) -> None:
        self.decodes, self.prefills = decodes, prefills
        self.method, self.decoder = method, decoder
        self.stats = DecodeStats()  # filled by the attention function
        self.decode_seconds = 0.0  # summed over layers, filled by the attention function
        self.keep_queries_of: int | None = None  # layer whose decode queries are kept, set by the runner
        self.kept_queries: Tensor | None = None  # [num_decodes, num_q_heads, head_dim]
        self._rows: dict[int | None, list[DecodeRow]] = {}

    def rows(self, sliding_window: int | None) -> list[DecodeRow]:
        """What each decode token sees; the same in all layers of one window, so chosen once a step."""
        if sliding_window not in self._rows:
            self._rows[sliding_window] = [
                DecodeRow(s.context, self._select(s.context, sliding_window)) for s in self.decodes
            ]
        return self._rows[sliding_window]

    def _select(self, context: Context, window: int | None) -> list[Run]:
        if window is not None and context.num_tokens + 1 > window:
            return clip_runs(context.runs(num_new=1), context.num_tokens + 1 - window)
        return self.method.select(context)


def register() -> None:
    """Make `attn_implementation="retrieval"` known to transformers; idempotent."""
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, no_mask)


def no_mask(*args: Any, **kwargs: Any) -> None:
    """Causality is the attention function's own; no mask is ever materialised."""


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    *,
    step: Step,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed row: query `[1, num_q_heads, num_tokens, head_dim]`, key and value with KV heads.

    Writes K and V to each context's tail (committed by the caller after the pass) and returns
    `[1, num_tokens, num_q_heads, head_dim]` in the query's dtype.
    """
    layer_idx = int(module.layer_idx)  # type: ignore[arg-type]
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    q, k, v = query[0], key[0], value[0]
    out = torch.empty_like(q)
    for span in (*step.decodes, *step.prefills):
        rows = slice(span.row, span.row + span.num_tokens)
        span.context.tail.write(layer_idx, k[:, rows], v[:, rows])
    if step.decodes:
        out[:, : len(step.decodes)] = _decode(q, layer_idx, scale, sliding_window, step)
    for span in step.prefills:
        rows = slice(span.row, span.row + span.num_tokens)
        step.method.observe(span.context, layer_idx, q[:, rows])
        out[:, rows] = attend_chunk(q[:, rows], span.context, layer_idx, scale, sliding_window)
    return out.transpose(0, 1)[None], None


def _decode(q: Tensor, layer_idx: int, scale: float, window: int | None, step: Step) -> Tensor:
    """The first `num_decodes` rows of `q [num_q_heads, num_tokens, head_dim]`; returns the same layout."""
    started = time.perf_counter()
    queries = q[:, : len(step.decodes)].transpose(0, 1).contiguous()
    if step.keep_queries_of == layer_idx:
        step.kept_queries = queries
    out = step.decoder.attend(queries, step.rows(window), layer_idx, scale, step.stats)
    step.decode_seconds += time.perf_counter() - started
    return out.transpose(0, 1)


def read_geometry(config: PretrainedConfig, dtype: torch.dtype) -> Geometry:
    """The attention geometry of a transformers config. Raises `UnsupportedModelError` with the reason."""
    text = config.get_text_config(decoder=True)
    layer_types = list(getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers)
    unknown = set(layer_types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UnsupportedModelError(
            f"{config.model_type}: layers of type {', '.join(sorted(unknown))} are not supported"
        )
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedModelError(f"{config.model_type}: multi-head latent attention is not supported")
    if getattr(text, "attn_logit_softcapping", None):
        raise UnsupportedModelError(f"{config.model_type}: attention logit soft-capping is not supported")
    if getattr(text, "alibi", False) or not hasattr(text, "num_attention_heads"):
        raise UnsupportedModelError(f"{config.model_type}: only rotary multi-head attention is supported")
    num_q_heads = int(text.num_attention_heads)
    return Geometry(
        num_layers=int(text.num_hidden_layers),
        num_q_heads=num_q_heads,
        num_kv_heads=int(getattr(text, "num_key_value_heads", None) or num_q_heads),
        head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // num_q_heads),
        dtype=dtype,
        sliding_windows=_sliding_windows(text, layer_types),
    )


def _sliding_windows(text: PretrainedConfig, layer_types: list[str]) -> tuple[int | None, ...]:
    """Per layer; Mistral marks no layer types but slides in all of them."""
    window = getattr(text, "sliding_window", None)
    if getattr(text, "layer_types", None) is None:
        uses = window is not None and getattr(text, "use_sliding_window", True)
        return tuple(window if uses else None for _ in layer_types)
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
