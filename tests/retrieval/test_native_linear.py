"""The core's products of a few rows with weights against torch, level against level."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

_core = pytest.importorskip("retrieval._core")

EPSILON = 1e-5
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 256, 512), (3, 512, 65), (9, 250, 1), (17, 1, 70)], ids=str)
def test_product_is_that_of_torch(level: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    num_rows, num_inputs, num_outputs = shape
    weights, bias = normal(num_outputs, num_inputs, seed=1).to(dtype), normal(num_outputs, seed=2)
    rows, norm = normal(num_rows, num_inputs, seed=3), normal(num_inputs, seed=4)
    out = torch.full((num_rows, num_outputs), torch.nan)
    _core.Linear(weights).apply(_core.Matrix(rows), _core.Matrix(out))
    torch.testing.assert_close(out, rows @ weights.float().T, rtol=1e-4, atol=1e-4)
    _core.Linear(weights, bias, norm, EPSILON).apply(_core.Matrix(rows), _core.Matrix(out), True)
    normed = functional.rms_norm(rows, (num_inputs,), norm, EPSILON)
    torch.testing.assert_close(out, (rows + normed) @ weights.float().T + bias, rtol=1e-4, atol=2e-4)


def test_gate_is_applied_first() -> None:
    weights, rows, out = normal(33, 40, seed=1), normal(2, 80, seed=2) * 20, torch.empty(2, 33)
    _core.Linear(weights, is_gated=True).apply(_core.Matrix(rows), _core.Matrix(out))
    expected = (functional.silu(rows[:, :40]) * rows[:, 40:]) @ weights.T
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-2)


def test_rows_lie_a_stride_apart_and_do_not_depend_on_each_other() -> None:
    weights, rows = normal(100, 64, seed=1).bfloat16(), normal(20, 80, seed=2)[:, :64]
    wide = torch.zeros(20, 120)
    _core.Linear(weights).apply(_core.Matrix(rows), _core.Matrix(wide[:, :100]))
    assert (wide[:, 100:] == 0).all()
    for i in range(20):
        out = torch.empty(1, 100)
        _core.Linear(weights).apply(_core.Matrix(rows[i : i + 1]), _core.Matrix(out))
        assert torch.equal(out[0], wide[i, :100])


def test_result_does_not_depend_on_threads() -> None:
    linear, rows = _core.Linear(normal(500, 64, seed=1)), normal(3, 64, seed=2)
    before, answers = _core.num_threads(), []
    try:
        for count in (1, 3):
            _core.set_num_threads(count)
            answers.append(torch.empty(3, 500))
            linear.apply(_core.Matrix(rows), _core.Matrix(answers[-1]))
    finally:
        _core.set_num_threads(before)
    assert torch.equal(*answers)


def test_wrong_shapes_are_refused() -> None:
    weights, rows, out = normal(4, 8, seed=1), _core.Matrix(torch.empty(2, 8)), _core.Matrix(torch.empty(2, 4))
    with pytest.raises(ValueError, match="weights"):
        _core.Linear(weights[0])
    with pytest.raises(ValueError, match="weights must be bfloat16"):
        _core.Linear(weights.double())
    with pytest.raises(ValueError, match="bias"):
        _core.Linear(weights, torch.empty(8))
    with pytest.raises(ValueError, match="norm"):
        _core.Linear(weights, None, torch.empty(4))
    with pytest.raises(ValueError, match="input has the wrong number"):
        _core.Linear(weights, is_gated=True).apply(rows, out)
    with pytest.raises(ValueError, match="output has the wrong number"):
        _core.Linear(weights).apply(rows, rows)
    with pytest.raises(ValueError, match="differ in their rows"):
        _core.Linear(weights).apply(rows, _core.Matrix(torch.empty(3, 4)))
    with pytest.raises(ValueError, match="columns dense"):
        _core.Matrix(torch.empty(8, 2).T)
