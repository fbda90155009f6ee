"""What capture.py keeps equals what a plain forward of the same model computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from scripts.bench import capture as subject

NUM_TOKENS = 700
GEOMETRY = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16}


@pytest.fixture(scope="module")
def model() -> Any:
    subject.register()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=2048, initializer_range=0.3,
    )  # fmt: skip
    config._attn_implementation = subject.ATTENTION_NAME
    return LlamaForCausalLM(config).eval()


def queries_and_keys(model: Any, token_ids: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
    """Q and K after RoPE of one layer, by transformers' own modules with eager attention."""
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            hidden = model(token_ids[None], output_hidden_states=True, use_cache=False).hidden_states[layer_idx]
            layer = model.model.layers[layer_idx]
            hidden = layer.input_layernorm(hidden)
            cos, sin = model.model.rotary_emb(hidden, torch.arange(len(token_ids))[None])
            q, k = (
                project(hidden)[0].unflatten(-1, (-1, GEOMETRY["head_dim"])).transpose(0, 1)[None]
                for project in (layer.self_attn.q_proj, layer.self_attn.k_proj)
            )
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
            return q[0], k[0]
    finally:
        model.set_attn_implementation(subject.ATTENTION_NAME)


def test_capture_keeps_the_models_own_queries_and_keys(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "CHUNK_TOKENS", 256)  # so that the prefill takes several chunks
    generator = torch.Generator().manual_seed(1)
    document = torch.randint(0, 97, (NUM_TOKENS,), generator=generator)
    questions = [torch.randint(0, 97, (n,), generator=generator) for n in (30, 40)]
    tensors, scale = subject.capture(model, document, questions, 64, 16, 80, seed=3)
    assert scale == pytest.approx(16**-0.5)
    rows = torch.Generator().manual_seed(3)
    train = subject.sample(0, NUM_TOKENS - subject.TAIL_TOKENS, 64, rows)
    same = subject.sample(NUM_TOKENS - subject.TAIL_TOKENS, NUM_TOKENS, 16, rows)
    for layer in (0, 1):
        q, k = queries_and_keys(model, document, layer)
        torch.testing.assert_close(tensors[f"keys.{layer}"], k, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(tensors[f"train.{layer}"], q[:, train], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(tensors[f"same.{layer}"], q[:, same], rtol=1e-4, atol=1e-4)
        later = [queries_and_keys(model, torch.cat((document, x)), layer)[0][:, NUM_TOKENS:] for x in questions]
        torch.testing.assert_close(tensors[f"later.{layer}"], torch.cat(later, dim=1), rtol=1e-4, atol=1e-4)
        assert tensors[f"values.{layer}"].shape == (2, NUM_TOKENS, 16)


def test_sample_is_distinct_ascending_and_in_range() -> None:
    rows = subject.sample(10, 20, 100, torch.Generator().manual_seed(0))
    assert rows.tolist() == list(range(10, 20))
    assert len(subject.sample(5, 5, 3, torch.Generator())) == 0
