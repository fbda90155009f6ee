"""The one patch point on transformers: an attention function and a mask function under one name.

Registered by an explicit call. The step's state arrives as the forward keyword argument `step`, beside
`position_ids`. What a config says of a model's attention is read here too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig

from retrieval.attention import Step, attend_packed
from retrieval.geometry import Geometry

ATTENTION_NAME = "retrieval"


class UnsupportedModelError(ValueError):
    """A model whose attention this project does not implement."""


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
    """`attend_packed` as transformers calls it: query `[1, num_q_heads, num_tokens, head_dim]`, key and value
    with KV heads; returns `[1, num_tokens, num_q_heads, head_dim]`.
    """
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    layer_idx = int(module.layer_idx)  # type: ignore[arg-type]
    return attend_packed(q.contiguous(), k, v, layer_idx, scale, sliding_window, step)[None], None


def read_geometry(config: PretrainedConfig, dtype: torch.dtype, is_quantized: bool = False) -> Geometry:
    """The attention geometry of a transformers config. Raises `UnsupportedModelError` with the reason."""
    try:
        text = config.get_text_config(decoder=True)
        layer_types = list(getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers)
        num_q_heads = int(text.num_attention_heads)
        num_kv_heads = int(getattr(text, "num_key_value_heads", None) or num_q_heads)
        head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // num_q_heads)
    except (AttributeError, TypeError) as error:
        raise UnsupportedModelError(
            f"{config.model_type}: attention that differs by layer, or none ({error})"
        ) from error
    reason = _refusal(config, text, layer_types)
    if reason:
        raise UnsupportedModelError(f"{config.model_type}: {reason} not supported")
    return Geometry(
        num_layers=int(text.num_hidden_layers),
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        sliding_windows=_sliding_windows(text, layer_types),
        is_quantized=is_quantized,
    )


def _refusal(config: PretrainedConfig, text: PretrainedConfig, layer_types: list[str]) -> str | None:
    """What a config asks for that `attend_packed` does not do."""
    unknown = set(layer_types) - {"full_attention", "sliding_attention"}
    if unknown:
        return f"layers of type {', '.join(sorted(unknown))} are"
    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder attention is"
    if getattr(text, "kv_lora_rank", None):
        return "multi-head latent attention is"
    if getattr(text, "attn_logit_softcapping", None):
        return "attention logit soft-capping is"
    if getattr(text, "num_kv_shared_layers", 0):
        return "sharing K and V between layers is"
    if getattr(text, "alibi", False):
        return "ALiBi is"
    return None


def check_model(model: Any, geometry: Geometry) -> None:
    """Refuse a loaded model whose layers do not all call our attention function, causally and without extras.

    Raises `UnsupportedModelError` with the reason.
    """
    name = type(model).__name__
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModelError(f"{name} does not let its attention be replaced")
    layers = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "scaling")]
    if len(layers) != geometry.num_layers:
        raise UnsupportedModelError(f"{name}: {len(layers)} attention layers found, {geometry.num_layers} expected")
    for layer in layers:
        if not getattr(layer, "is_causal", True):
            raise UnsupportedModelError(f"{name}: attention that is not causal is not supported")
        if getattr(layer, "sinks", None) is not None:
            raise UnsupportedModelError(f"{name}: learned attention sinks are not supported")


def _sliding_windows(text: PretrainedConfig, layer_types: list[str]) -> tuple[int | None, ...]:
    """Per layer; Mistral marks no layer types but slides in all of them."""
    window = getattr(text, "sliding_window", None)
    if getattr(text, "layer_types", None) is None:
        uses = window is not None and getattr(text, "use_sliding_window", True)
        return tuple(window if uses else None for _ in layer_types)
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
