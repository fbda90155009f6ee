"""Stretches: they change no inner product, gain where keys and queries are unlike, and are left alone elsewhere."""

import pytest
import torch
from torch import Tensor

from retrieval import native
from retrieval.balance import balance

WIDTHS = 4.0 ** torch.linspace(-1, 1, 64)  # standard deviations of the coordinates, before they are mixed


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unlike(num_keys: int) -> tuple[Tensor, Tensor]:
    """Keys of two heads that are narrow where their queries are wide, mixed by a rotation; 4 query heads."""
    mix = torch.linalg.qr(normal(64, 64, seed=9)).Q
    keys, queries = normal(2, num_keys, 64, seed=1) * WIDTHS, normal(4, 2000, 64, seed=2) / WIDTHS
    return keys @ mix + normal(64, seed=3), queries @ mix


def test_stretches_change_no_product_and_gain() -> None:
    keys, queries = unlike(3000)
    stretches = balance(keys, queries)
    assert stretches is not None
    stretch, inverse = stretches
    moved_keys, moved = keys @ stretch.mT, queries.reshape(2, -1, 64) @ inverse.mT
    products = queries.reshape(2, -1, 64) @ keys.mT
    torch.testing.assert_close(moved @ moved_keys.mT, products, rtol=1e-3, atol=1e-2)

    def spread(k: Tensor, q: Tensor) -> Tensor:
        return (k - k.mean(1, keepdim=True)).square().sum(-1).mean(1) * q.square().sum(-1).mean(1)

    assert (spread(moved_keys, moved) < spread(keys, queries.reshape(2, -1, 64)) / 2).all()


def test_alike_and_too_few_are_left_alone() -> None:
    alike = normal(2, 3000, 64, seed=1), normal(4, 2000, 64, seed=2)
    assert balance(*alike) is None
    keys, queries = unlike(3000)
    assert balance(keys[:, :200], queries) is None
    assert balance(keys, queries[:, :50]) is None
    assert balance(torch.zeros(2, 3000, 64), torch.zeros(4, 2000, 64)) is None


def test_a_head_without_gain_keeps_the_identity() -> None:
    keys, queries = unlike(3000)
    keys[1], queries[2:] = normal(3000, 64, seed=5), normal(2, 2000, 64, seed=6)
    stretches = balance(keys, queries)
    assert stretches is not None
    assert torch.equal(stretches[0][1], torch.eye(64))
    assert not torch.equal(stretches[0][0], torch.eye(64))


@pytest.mark.skipif(native.core() is None, reason="needs the C++ core")
def test_balanced_codes_find_the_same_with_fewer_scores() -> None:
    core = native.core()
    assert core is not None
    keys, queries = unlike(20_000)
    asked, scored, errors = queries[:, :1].transpose(0, 1).contiguous() * 6, [], []
    values = normal(2, 20_000, 64, seed=7)
    logits = (asked[0].reshape(2, 2, 64) @ keys.mT) / 8
    expected = (torch.softmax(logits, -1) @ values).reshape(1, 4, 64)
    for stretches in ((), balance(keys, queries)):
        assert stretches is not None
        codes = core.LayerCodes(2, 64, 2, 0, *stretches)
        codes.append(keys)
        out, lse = torch.empty(1, 4, 64), torch.empty(1, 4)
        part = core.Part(keys, values, 0, 20_000, codes)
        budget = core.Budget(rest=0.0)
        scored.append(core.attend_layer(asked, [[part]], 1 / 8, out, lse, budget).num_scored)
        errors.append(float((out - expected).norm() / expected.norm()))
        loaded = core.LayerCodes.load(codes.save())
        again = torch.empty(1, 4, 64)
        core.attend_layer(asked, [[core.Part(keys, values, 0, 20_000, loaded)]], 1 / 8, again, lse, budget)
        assert torch.equal(again, out)
    assert max(errors) < 0.01
    assert scored[1] < 0.7 * scored[0]


@pytest.mark.skipif(native.core() is None, reason="needs the C++ core")
def test_stretches_that_do_not_fit_are_refused() -> None:
    core = native.core()
    assert core is not None
    eye = torch.eye(64).expand(2, 64, 64).contiguous()
    for keys, queries, message in (
        (eye, eye * 2, "inverse"),
        (eye[:1].contiguous(), eye, "must be"),
        (eye, None, "come"),
    ):
        with pytest.raises(ValueError, match=message):
            core.LayerCodes(2, 64, 2, 0, keys, queries)
    with pytest.raises(ValueError, match="inverse"):
        core.LayerCodes(2, 64, 2, 0, eye * torch.nan, eye)
