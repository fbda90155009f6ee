"""The fused forward's own steps against transformers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from retrieval.adapter import read_geometry
from server.engine import fused_model
from server.engine.fused_model import fuse
from server.engine.workspace import HEAP
from tests.server.engine.conftest import SIZES

ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 500000.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 2048},
    {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
]  # fmt: skip


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotation_is_that_of_transformers(rope: dict[str, Any], dtype: torch.dtype) -> None:
    model = LlamaForCausalLM(LlamaConfig(head_dim=16, rope_parameters=rope, **SIZES)).to(dtype)
    fused = fuse(model, read_geometry(model.config, dtype))
    assert fused is not None
    hidden, positions = torch.zeros(5, 64, dtype=dtype), torch.tensor([0, 1, 77, 4095, 8191])
    cos, sin = fused._rotation(hidden, positions)
    expected = model.model.rotary_emb(hidden[None], position_ids=positions[None])
    assert torch.equal(cos[:, 0], expected[0][0])
    assert torch.equal(sin[:, 0], expected[1][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.inference_mode()
def test_a_pass_in_a_workspace_is_that_of_the_heap(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    sizes = {"head_dim": 16, **SIZES}
    makers: dict[str, Any] = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(attention_bias=True, **sizes)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**sizes)),
    }
    model = makers[family]().to(dtype).eval()
    fused = fuse(model, read_geometry(model.config, dtype))
    assert fused is not None
    seen: list[torch.Tensor] = []

    def attend(queries: torch.Tensor, keys: Any, values: Any, *args: Any) -> torch.Tensor:
        """Stands for attention: all of its arguments matter, and it writes where it is told to."""
        out = args[-1] if args[-1] is not None else torch.empty_like(queries)
        seen.append(out)
        group = queries.shape[1] // keys.shape[1]
        return out.copy_(queries * 0.5 + keys.repeat_interleave(group, 1) + values.repeat_interleave(group, 1))

    monkeypatch.setattr(fused_model, "attend_packed", attend)
    tokens, positions = torch.randint(0, SIZES["vocab_size"], (100,)), torch.arange(100)
    step: Any = type("NoStep", (), {"announce": lambda self: None})()
    monkeypatch.setattr(fused, "_room", lambda _: HEAP)
    expected = fused._run(tokens, positions, [5, 99], step)
    monkeypatch.undo()
    monkeypatch.setattr(fused_model, "attend_packed", attend)
    for _ in range(3):  # what does not fit yet is allocated
        found = fused._run(tokens, positions, [5, 99], step)
        assert torch.equal(found, expected)
    begin = fused._workspace._pages.data_ptr()
    assert all(begin <= out.data_ptr() < begin + fused._workspace.nbytes for out in seen[-len(model.model.layers) :])
    needed = fused._workspace.nbytes
    fused.reserve(200)
    assert 2 * needed <= fused._workspace.nbytes < 2.1 * needed
