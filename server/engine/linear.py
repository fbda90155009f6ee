"""Products of decode rows with a layer's weights: the core's `Linear`, or its twin in torch where there is no core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from retrieval import native


class Linear(Protocol):
    """`out = rows @ weights.T + bias`, where rows may go through a norm or a gate before."""

    def apply(self, rows: Any, out: Any, add: bool = False) -> None:
        """rows `[num_rows, num_inputs]`, twice as wide if gated, out `[num_rows, num_outputs]`, as `rows_of` made
        them; add: to what is in `out`."""


class TorchLinear:
    """As the core's, over a float32 copy of the weights."""

    def __init__(
        self,
        weights: Tensor,
        bias: Tensor | None = None,
        norm: Tensor | None = None,
        epsilon: float = 0.0,
        is_gated: bool = False,
    ) -> None:
        self._weights, self._bias = weights.float(), bias
        self._norm, self._epsilon, self._is_gated = norm, epsilon, is_gated

    def apply(self, rows: Tensor, out: Tensor, add: bool = False) -> None:
        """See `Linear.apply`."""
        if self._is_gated:
            gate, up = rows.chunk(2, dim=-1)
            rows = functional.silu(gate) * up
        if self._norm is not None:
            rows = torch.rms_norm(rows, self._norm.shape, self._norm, self._epsilon)
        product = functional.linear(rows, self._weights, self._bias)
        if add:
            out.add_(product)
        else:
            out.copy_(product)


def make_linear(
    weights: Tensor,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    epsilon: float = 0.0,
    is_gated: bool = False,
) -> Linear:
    """weights `[num_outputs, num_inputs]`, of any float dtype and shared with the caller where the core multiplies;
    bias `[num_outputs]`; norm `[num_inputs]`, weights of a root mean square norm that the rows go through first;
    is_gated: rows are `[gate, up]` and silu(gate) * up is multiplied."""
    core = native.core()
    kind: Any = TorchLinear if core is None else core.Linear
    wide = [None if t is None else t.detach().float().contiguous() for t in (bias, norm)]
    made: Linear = kind(weights.detach().contiguous(), *wide, epsilon, is_gated)
    return made


def rows_of() -> Callable[[Tensor], Any]:
    """What makes a float32 tensor `[num_rows, num_columns]` the rows that `Linear.apply` takes; they share memory."""
    core = native.core()
    make: Callable[[Tensor], Any] = (lambda tensor: tensor) if core is None else core.Matrix
    return make
