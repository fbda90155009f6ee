"""Merging partial results gives what one softmax over all keys gives."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from retrieval.merge import Partial, empty_partial, merge

TOLERANCE = 1e-6  # float32 sums in another order
HEADS, DIM = 3, 8


def attend(scores: Tensor, values: Tensor) -> Partial:
    """Softmax over the last axis of scores `[heads, m]`, values `[heads, m, d]`."""
    if scores.shape[1] == 0:
        return empty_partial((HEADS, DIM), torch.device("cpu"))
    return torch.einsum("hm,hmd->hd", torch.softmax(scores, 1), values), torch.logsumexp(scores, 1)


def scores_and_values(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return 5 * torch.randn(HEADS, count, generator=random), torch.randn(HEADS, count, DIM, generator=random)


def parts_of(scores: Tensor, values: Tensor, bounds: list[int]) -> list[Partial]:
    edges = [0, *bounds, scores.shape[1]]
    return [attend(scores[:, a:b], values[:, a:b]) for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("bounds", [[], [1], [16], [0, 7], [3, 3, 20], [1, 2, 3, 4, 5, 31]])
def test_merge_equals_softmax_over_the_union(bounds: list[int]) -> None:
    scores, values = scores_and_values(32)
    out, lse = merge(parts_of(scores, values, bounds))
    whole_out, whole_lse = attend(scores, values)
    torch.testing.assert_close(out, whole_out, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(lse, whole_lse, atol=TOLERANCE, rtol=TOLERANCE)


def test_merge_ignores_the_order_of_parts() -> None:
    scores, values = scores_and_values(32)
    parts = parts_of(scores, values, [5, 9, 30])
    torch.testing.assert_close(merge(parts), merge(parts[::-1]), atol=TOLERANCE, rtol=TOLERANCE)


def test_merge_ignores_empty_part() -> None:
    scores, values = scores_and_values(6)
    part = attend(scores, values)
    merged = merge([empty_partial((HEADS, DIM), torch.device("cpu")), part])
    torch.testing.assert_close(merged, part, atol=TOLERANCE, rtol=TOLERANCE)


def test_merge_of_parts_empty_for_some_rows_only() -> None:
    scores, values = scores_and_values(8)
    left, right = parts_of(scores, values, [4])
    left[0][1], left[1][1] = 0.0, float("-inf")
    out, lse = merge([left, right])
    torch.testing.assert_close(out[1], right[0][1], atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(lse[0], attend(scores, values)[1][0], atol=TOLERANCE, rtol=TOLERANCE)


def test_merge_of_only_empty_parts_is_empty() -> None:
    empty = empty_partial((HEADS, DIM), torch.device("cpu"))
    for parts in ([empty], [empty, empty, empty]):
        out, lse = merge(parts)
        assert torch.equal(out, torch.zeros(HEADS, DIM))
        assert torch.equal(lse, torch.full((HEADS,), float("-inf")))


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_merge_keeps_its_precision_far_from_zero(offset: float) -> None:
    scores, values = scores_and_values(32)
    out, lse = merge(parts_of(scores + offset, values, [10]))
    assert torch.isfinite(lse).all()
    torch.testing.assert_close(out, attend(scores, values)[0], atol=5e-3, rtol=5e-3)  # 1e4 leaves 1e-3 of a score


def test_merge_leaves_its_inputs_alone() -> None:
    parts = parts_of(*scores_and_values(8), [4])
    before = [(out.clone(), lse.clone()) for out, lse in parts]
    merge(parts)
    torch.testing.assert_close(parts, before, atol=0, rtol=0)
