"""Which models share their caches: those whose K and V are the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from retrieval.geometry import Geometry
from server.engine.fingerprint import fingerprint

GEOMETRY = Geometry(1, 2, 1, 8, torch.bfloat16, (None,))
CONFIG = {"rope_theta": 10_000.0, "hidden_size": 4}


def weights(**changed: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    made = {"a": torch.randn(3, 4, generator=generator), "b": torch.randn(5, generator=generator).to(torch.bfloat16)}
    return {**made, **changed}


def test_the_same_model_has_the_same_fingerprint() -> None:
    assert fingerprint(CONFIG, weights(), GEOMETRY) == fingerprint(dict(reversed(CONFIG.items())), weights(), GEOMETRY)
    turned = weights(a=weights()["a"].t().contiguous().t())
    assert fingerprint(CONFIG, turned, GEOMETRY) == fingerprint(CONFIG, weights(), GEOMETRY), "layout does not matter"


def test_whatever_changes_k_and_v_changes_the_fingerprint() -> None:
    one_bit = weights()["a"].clone()
    one_bit.view(torch.int32)[1, 2] ^= 1
    models = [
        (CONFIG, weights(), GEOMETRY),
        (CONFIG, weights(a=one_bit), GEOMETRY),
        (CONFIG, weights(a=weights()["a"].reshape(4, 3)), GEOMETRY),
        (CONFIG, weights(a=weights()["a"].view(torch.int32)), GEOMETRY),
        (CONFIG, weights(c=torch.zeros(0)), GEOMETRY),
        (CONFIG, weights(quantization="nf4"), GEOMETRY),
        (CONFIG, weights(quantization="fp4"), GEOMETRY),
        (CONFIG | {"rope_theta": 20_000.0}, weights(), GEOMETRY),
        (CONFIG, weights(), replace(GEOMETRY, is_quantized=True)),
        (CONFIG, weights(), replace(GEOMETRY, dtype=torch.float16)),
    ]
    assert len({fingerprint(*model) for model in models}) == len(models)
