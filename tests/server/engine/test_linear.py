"""The twin of the core's products."""

from __future__ import annotations

import pytest
import torch

from retrieval import native
from server.engine.linear import TorchLinear, make_linear, rows_of


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("add", [False, True])
def test_core_and_twin_agree(is_gated: bool, has_norm: bool, add: bool) -> None:
    if native.core() is None:
        pytest.skip("no core")
    generator = torch.Generator().manual_seed(0)
    weights, bias = torch.randn(50, 32, generator=generator).bfloat16(), torch.randn(50, generator=generator).bfloat16()
    norm = torch.randn(32, generator=generator).bfloat16() if has_norm else None
    rows, out = torch.randn(3, 64 if is_gated else 32, generator=generator), torch.randn(3, 50, generator=generator)
    twin = out.clone()
    make_linear(weights, bias, norm, 1e-6, is_gated).apply(rows_of()(rows), rows_of()(out), add)
    wide = None if norm is None else norm.float()
    TorchLinear(weights, bias.float(), wide, 1e-6, is_gated).apply(rows, twin, add)
    torch.testing.assert_close(out, twin, rtol=1e-4, atol=1e-4)


def test_without_the_core_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "core", lambda: None)
    rows = torch.ones(1, 4)
    assert isinstance(make_linear(torch.ones(2, 4)), TorchLinear)
    assert rows_of()(rows) is rows
