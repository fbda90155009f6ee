"""Exact attention over one block, with its log-sum-exp."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from retrieval.partial_attention import attend_block, attend_grouped, attend_masked

# of outputs of about 1: rounding of the inputs' dtype, which the kernel also gives its output
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
HEADS, GROUP, N, M, DIM, SCALE = 2, 3, 5, 37, 16, 0.3


def random_block(dtype: torch.dtype, n: int = N, m: int = M) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[heads * group, n, d]`, keys and values `[heads, m, d]`."""
    random = torch.Generator().manual_seed(3)
    shapes = ((HEADS * GROUP, n, DIM), (HEADS, m, DIM), (HEADS, m, DIM))
    q, k, v = (torch.randn(shape, generator=random).to(dtype) for shape in shapes)
    return q, k, v


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    group = q.shape[0] // k.shape[0]
    scores = q.double() @ k.double().repeat_interleave(group, 0).transpose(1, 2) * SCALE
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    out = torch.softmax(scores, -1).nan_to_num(0.0) @ v.double().repeat_interleave(group, 0)
    return out.float(), torch.logsumexp(scores, -1).float()


@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_grouped_heads_share_their_keys(dtype: torch.dtype) -> None:
    q, k, v = random_block(dtype)
    out, lse = attend_grouped(q, k, v, SCALE)
    assert out.dtype == lse.dtype == torch.float32
    assert (out.shape, lse.shape) == (q.shape, q.shape[:2])
    torch.testing.assert_close((out, lse), plain(q, k, v), atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("n", [1, 2, 64, 129])
def test_causal_block_sees_nothing_ahead(dtype: torch.dtype, n: int) -> None:
    q, k, v = random_block(dtype, n, n)
    k, v = k.repeat_interleave(GROUP, 0), v.repeat_interleave(GROUP, 0)
    mask = torch.ones(n, n, dtype=torch.bool).tril()
    result = attend_block(q, k, v, SCALE, is_causal=True)
    torch.testing.assert_close(result, plain(q, k, v, mask), atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


def test_masked_rows_without_a_key_are_empty_parts() -> None:
    q, k, v = random_block(torch.float32)
    mask = torch.rand(N, M, generator=torch.Generator().manual_seed(4)) < 0.3
    mask[2] = False
    out, lse = attend_masked(q, k, v, SCALE, mask)
    torch.testing.assert_close((out, lse), plain(q, k, v, mask), atol=1e-5, rtol=1e-5)
    assert torch.equal(out[:, 2], torch.zeros(HEADS * GROUP, DIM))
    assert bool((lse[:, 2] == float("-inf")).all())
