"""What transformers sees of us: an attention function, a mask function, and which models are taken or refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from retrieval import adapter
from retrieval.adapter import UnsupportedModelError, attention_forward, no_mask, read_geometry, register
from retrieval.attention import Span, Step
from retrieval.context import Context
from retrieval.decode import TorchDecoder
from retrieval.methods import METHODS, make_method

SIZES = {
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 128,
    "max_position_embeddings": 4096,
}


def config_of(name: str, **options: Any) -> Any:
    return getattr(transformers, f"{name}Config")(**(SIZES | options))


@pytest.mark.parametrize(
    ("name", "options", "head_dim", "windows"),
    [
        ("Llama", {}, 8, (None, None, None)),
        ("Llama", {"head_dim": 32}, 32, (None, None, None)),
        ("Qwen2", {}, 8, (None, None, None)),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, 8, (None, 64, 64)),
        ("Qwen3", {"head_dim": 16}, 16, (None, None, None)),
        ("Mistral", {"sliding_window": 4096}, 8, (4096, 4096, 4096)),
        ("Mistral", {"sliding_window": None}, 8, (None, None, None)),
        ("Phi3", {"pad_token_id": 0}, 8, (None, None, None)),
        ("Phi3", {"pad_token_id": 0, "sliding_window": 2047}, 8, (2047, 2047, 2047)),
        ("SmolLM3", {"pad_token_id": 0}, 8, (None, None, None)),
        ("Gemma3Text", {"head_dim": 16, "sliding_window": 32, "sliding_window_pattern": 2}, 16, (32, None, 32)),
    ],
)
def test_geometry_of_models_that_are_taken(
    name: str, options: dict[str, Any], head_dim: int, windows: tuple[int | None, ...]
) -> None:
    if name == "Gemma3Text":
        options = options | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    geometry = read_geometry(config_of(name, **options), torch.bfloat16)
    assert (geometry.num_layers, geometry.num_q_heads, geometry.num_kv_heads) == (3, 8, 2)
    assert (geometry.head_dim, geometry.dtype) == (head_dim, torch.bfloat16)
    assert geometry.sliding_windows == windows


def test_one_kv_head_for_each_query_head_where_the_config_names_none() -> None:
    config = transformers.GPTNeoXConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=8)
    assert read_geometry(config, torch.float32).num_kv_heads == 8


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("Gemma2", {}, "gemma2.*soft-capping"),
        ("DeepseekV3", {}, "deepseek_v3.*latent attention"),
        ("Llama4Text", {}, "llama4_text.*chunked_attention"),
        ("Qwen3Next", {}, "qwen3_next.*linear_attention"),
    ],
)
def test_models_of_another_attention_are_refused(name: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        read_geometry(config_of(name, **options), torch.float32)


def test_the_mask_is_never_materialised() -> None:
    assert no_mask(batch_size=1, q_length=10, kv_length=10, mask_function=None, dtype=torch.float32) is None


def test_register_may_be_called_again() -> None:
    register()
    register()
    assert AttentionInterface()[adapter.ATTENTION_NAME] is attention_forward
    assert AttentionMaskInterface()[adapter.ATTENTION_NAME] is no_mask


def forward(world: Any, contexts: list[Context], rows: list[int], q: Any, k: Any, v: Any, name: str = "full") -> Any:
    """One layer's attention over a packed row; `rows[i]` tokens of context i, decodes (of one token) first."""
    starts = [sum(rows[:i]) for i in range(len(rows))]
    spans = [Span(c, start, n) for c, start, n in zip(contexts, starts, rows, strict=True)]
    decodes, prefills = [s for s in spans if s.num_tokens == 1], [s for s in spans if s.num_tokens > 1]
    step = Step(decodes, prefills, make_method(name, num_retrieved=5), TorchDecoder(5))
    for span in spans:
        span.context.tail.reserve(span.num_tokens)
    module = nn.Module()
    module.layer_idx = 1  # type: ignore[assignment]
    return attention_forward(module, q[None], k[None], v[None], None, scaling=world.scale, step=step), step


@pytest.mark.parametrize("name", METHODS)
def test_a_packed_row_equals_one_sequence_at_a_time(world: Any, name: str) -> None:
    rows = [1, 1, 6, 9]

    def contexts() -> list[Context]:
        world.random.manual_seed(5)
        made = [world.context([30], num_tail=4), world.context(num_tail=50), world.context(), world.context([20], [13])]
        world.index(made[0].path[0].segment)
        return made

    q, k, v = world.randn(4, 17, 16), world.randn(2, 17, 16), world.randn(2, 17, 16)
    (packed, weights), step = forward(world, contexts(), rows, q, k, v, name)
    assert (packed.shape, weights) == ((1, 17, 4, 16), None)
    assert step.report.seconds > 0
    alone = []
    for i, context in enumerate(contexts()):
        part = slice(sum(rows[:i]), sum(rows[: i + 1]))
        alone.append(forward(world, [context], rows[i : i + 1], q[:, part], k[:, part], v[:, part], name)[0][0])
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), atol=1e-6, rtol=1e-6)


def test_new_keys_and_values_are_written_but_not_committed(world: Any) -> None:
    context = world.context(num_tail=5)
    q, k, v = world.randn(4, 3, 16), world.randn(2, 3, 16), world.randn(2, 3, 16)
    forward(world, [context], [3], q, k, v)
    assert context.tail.length == 5
    assert torch.equal(context.tail.keys[1, :, 5:8], k)
    assert torch.equal(context.tail.values[1, :, 5:8], v)


@pytest.mark.parametrize("num_past", [3, 20])
def test_a_sliding_layer_sees_its_window_only_when_decoding(world: Any, oracle: Any, num_past: int) -> None:
    context = world.context([num_past], num_tail=2)
    world.index(context.path[0].segment)
    q, k, v = world.randn(4, 1, 16), world.randn(2, 1, 16), world.randn(2, 1, 16)
    context.tail.reserve(1)
    step = Step([Span(context, 0, 1)], [], make_method("retrieval", num_retrieved=50), TorchDecoder(50))
    module: Any = SimpleNamespace(layer_idx=0)
    out, _ = attention_forward(module, q[None], k[None], v[None], None, scaling=None, sliding_window=7, step=step)
    keys, values = world.all_kv(context, 0, 1)
    expected = oracle(q, keys[:, -7:], values[:, -7:], 16**-0.5)
    torch.testing.assert_close(out[0].transpose(0, 1), expected, atol=1e-5, rtol=1e-5)
