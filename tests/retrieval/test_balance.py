"""Maps: they change no inner product, gain where keys and queries are unlike, leave out what no product needs, and are
left alone elsewhere."""

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
    maps = balance(keys, queries)
    assert maps is not None
    stretch, inverse, _ = maps
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
    maps = balance(keys, queries)
    assert maps is not None
    assert torch.equal(maps.key_stretch[1], torch.eye(64))
    assert not torch.equal(maps.key_stretch[0], torch.eye(64))
    assert maps.shapes[1] == (64, 2)


@pytest.mark.skipif(native.core() is None, reason="needs the C++ core")
def test_balanced_codes_find_the_same_with_fewer_scores() -> None:
    core = native.core()
    assert core is not None
    keys, queries = unlike(20_000)
    asked, scored, errors = queries[:, :1].transpose(0, 1).contiguous() * 6, [], []
    values = normal(2, 20_000, 64, seed=7)
    logits = (asked[0].reshape(2, 2, 64) @ keys.mT) / 8
    expected = (torch.softmax(logits, -1) @ values).reshape(1, 4, 64)
    for maps in ((), balance(keys, queries)):
        assert maps is not None
        codes = core.LayerCodes(2, 64, 2, 0, *maps)
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


def flat(num_keys: int, num_wide: int, rest: float) -> tuple[Tensor, Tensor]:
    """As `unlike`, but keys and queries are both wide in the same directions, and `rest` as wide in the others."""
    widths = torch.where(torch.arange(64) < num_wide, 1.0, rest)
    mix = torch.linalg.qr(normal(64, 64, seed=9)).Q
    keys, queries = normal(2, num_keys, 64, seed=1) * widths, normal(4, 2000, 64, seed=2) * widths
    return keys @ mix + normal(64, seed=3), queries @ mix


@pytest.mark.parametrize(
    ("num_wide", "rest", "shape"),
    [(30, 0.0, (32, 3)), (28, 0.05, (32, 3)), (46, 0.05, (48, 2)), (46, 0.7, (64, 2)), (60, 0.0, (64, 2))],
)
def test_coordinates_that_hardly_add_to_products_are_left_out(
    num_wide: int, rest: float, shape: tuple[int, int]
) -> None:
    keys, queries = flat(3000, num_wide, rest)
    maps = balance(keys, queries)
    if shape == (64, 2):
        assert maps is None
        return
    assert maps is not None
    assert maps.shapes == [shape, shape]
    moved_keys, moved = keys @ maps.key_stretch.mT, queries.reshape(2, -1, 64) @ maps.query_stretch.mT
    products = queries.reshape(2, -1, 64) @ keys.mT
    torch.testing.assert_close(moved @ moved_keys.mT, products, rtol=1e-3, atol=1e-2)
    centred = keys - keys.mean(1, keepdim=True)
    coded = moved[..., : shape[0]] @ (centred @ maps.key_stretch.mT)[..., : shape[0]].mT
    lost = coded - queries.reshape(2, -1, 64) @ centred.mT
    assert lost.square().mean() < 0.02 * coded.square().mean()


def test_few_bits_or_coordinates_have_no_smaller_shape() -> None:
    keys, queries = flat(3000, 30, 0.0)
    assert balance(keys[..., :8].contiguous(), queries[..., :8].contiguous()) is None
    for bits in (1, 4):
        maps = balance(keys, queries, bits)
        assert maps is None or all(dims < 64 and each == bits for dims, each in maps.shapes)


@pytest.mark.skipif(native.core() is None, reason="needs the C++ core")
@pytest.mark.parametrize("shape", [(32, 3), (48, 2), (8, 4), (64, 1)])
@pytest.mark.parametrize("rest", [0.05, 1.0], ids=["fits", "leaves out half"])
def test_codes_of_a_shape_find_what_all_coordinates_would(shape: tuple[int, int], rest: float) -> None:
    core = native.core()
    assert core is not None
    keys, queries = flat(20_000, 30, rest)
    asked, values = queries[:, :1].transpose(0, 1).contiguous() * 8, normal(2, 20_000, 64, seed=7)
    expected = torch.softmax((asked[0].reshape(2, 2, 64) @ keys.mT) / 8, -1) @ values
    turn = torch.linalg.qr(normal(64, 64, seed=9)).Q.expand(2, 64, 64).contiguous()
    whole, pieces = (core.LayerCodes(2, 64, 2, 0, turn, turn, [shape, (64, 2)]) for _ in range(2))
    whole.append(keys)
    for begin, end in ((0, 2077), (2077, 2100), (2100, 20_000)):
        pieces.append(keys[:, begin:end])
    outs = []
    for codes in (whole, pieces, core.LayerCodes.load(whole.save())):
        assert codes.shapes == [shape, (64, 2)]
        assert codes.nbytes == whole.nbytes
        part = core.Part(keys, values, 0, 20_000, codes)
        for reach_products in (1 << 40, 1):  # every group is scanned, or those that means of runs do not rule out
            out, lse = torch.empty(1, 4, 64), torch.empty(1, 4)
            budget = core.Budget(beta=14.0, rest=0.0, max_keys=20_000, reach_products=reach_products)
            core.attend_layer(asked, [[part]], 1 / 8, out, lse, budget)
            outs.append(out)
    assert all(torch.equal(outs[i], outs[i % 2]) for i in range(6))
    for out in outs[:2]:
        error = (out.reshape(2, 2, 64) - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert error.max() < 0.01
    assert whole.save() == core.LayerCodes.load(whole.save()).save()
    plain = core.LayerCodes(2, 64, 2, 0)
    plain.append(keys)
    kept = (shape[0] * shape[1] + 128) / 256  # of the codes' bytes
    assert whole.nbytes < (0.1 + 0.9 * kept) * plain.nbytes + 2 * 5 * 4 * 64**2
    assert whole.nbytes <= core.LayerCodes.most_bytes(2, 64, 2, 20_000, is_stretched=True)


@pytest.mark.skipif(native.core() is None, reason="needs the C++ core")
def test_shapes_that_do_not_fit_are_refused() -> None:
    core = native.core()
    assert core is not None
    eye = torch.eye(64).expand(2, 64, 64).contiguous()
    for shapes, message in (
        ([(32, 3)], "for each head"),
        ([(32, 3), (72, 1)], "too large"),
        ([(64, 2), (48, 3)], "too large"),
        ([(64, 2), (20, 2)], "multiple of 8"),
        ([(64, 2), (0, 2)], "multiple of 8"),
        ([(64, 2), (32, 5)], "bits"),
    ):
        with pytest.raises(ValueError, match=message):
            core.LayerCodes(2, 64, 2, 0, eye, eye, shapes)
    with pytest.raises(ValueError, match="come with"):
        core.LayerCodes(2, 64, 2, 0, None, None, [(32, 3), (32, 3)])
    codes = core.LayerCodes(2, 64, 2, 0, eye, eye, [(32, 3), (48, 2)])
    codes.append(normal(2, 100, 64, seed=1))
    data = bytearray(codes.save())
    at = bytes(data).index((32).to_bytes(4, "little") + (3).to_bytes(4, "little"))
    for bad in (20, 72, 0, -8, 2**31 - 8):
        data[at : at + 4] = bad.to_bytes(4, "little", signed=True)
        with pytest.raises(ValueError):
            core.LayerCodes.load(bytes(data))


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
