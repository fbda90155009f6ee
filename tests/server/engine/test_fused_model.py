"""The fused forward's own steps against transformers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from retrieval.adapter import read_geometry
from server.engine.fused_model import fuse
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
