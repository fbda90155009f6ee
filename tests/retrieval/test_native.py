"""The core against its torch twin, level against level, and what it refuses. Seeds are fixed."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from retrieval import native
from tests.retrieval.conftest import LEVELS
from tests.retrieval.layer_attention import ExactPart, attend_layer

_core = pytest.importorskip("retrieval._core")

SCALE = 0.125
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Absolute, on outputs of about 1: inputs are the same bits, only the order of float32 sums differs.
OUT_TOLERANCE = 2e-5
LSE_TOLERANCE = 2e-5
BETA_TOLERANCE = 1.5e-2  # what 12 nats leave out of 5000 keys


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def whole_number(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high, (1,), generator=generator))


def gapped(
    num_keys: int,
    head_dim: int = 64,
    num_kv_heads: int = 2,
    group: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys round a shared mean, some directions wider than others; each query points at three of them."""
    spread = torch.linspace(2.0, 0.2, head_dim)
    keys = normal(num_kv_heads, num_keys, head_dim, seed=seed) * spread
    targets = torch.randint(
        0, max(1, num_keys), (num_kv_heads, group, 3), generator=torch.Generator().manual_seed(seed)
    )
    queries = torch.stack([keys[h][targets[h]].mean(1) for h in range(num_kv_heads)]) * 4.0
    queries = queries + 0.3 * normal(*queries.shape, seed=seed + 1)
    values = normal(num_kv_heads, num_keys, head_dim, seed=seed + 2)
    queries = queries.reshape(1, num_kv_heads * group, head_dim)
    return queries.to(dtype), (keys + normal(head_dim, seed=seed + 3)).to(dtype), values.to(dtype)


def attend(queries: Tensor, parts: list[list[Any]], **budget: float) -> tuple[Tensor, Tensor, Any]:
    out, lse = torch.full(queries.shape, torch.nan), torch.full(queries.shape[:2], torch.nan)
    budget = {"exact_keys": 512, **budget}  # few enough that the small cases of these tests are searched
    return out, lse, _core.attend_layer(queries, parts, SCALE, out, lse, _core.Budget(**budget))


def twin(queries: Tensor, parts: list[list[ExactPart]]) -> tuple[Tensor, Tensor]:
    out, lse = torch.empty(queries.shape), torch.empty(queries.shape[:2])
    attend_layer(queries, parts, SCALE, out, lse)
    return out, lse


def code(keys: Tensor, bits: int = 2, chunk: int = 1000) -> Any:
    codes = _core.LayerCodes(keys.shape[0], keys.shape[2], bits)
    for start in range(0, keys.shape[1], chunk):
        codes.append(keys[:, start : start + chunk])
    return codes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128, 256])
@pytest.mark.parametrize("num_keys", [0, 1, 127, 1500])
def test_exact_parts_agree_with_the_twin(level: str, dtype: torch.dtype, head_dim: int, num_keys: int) -> None:
    keys, values = (
        normal(2, num_keys, head_dim, seed=1, dtype=dtype),
        normal(2, num_keys, head_dim, seed=2, dtype=dtype),
    )
    queries = normal(3, 6, head_dim, seed=3, dtype=dtype)
    ranges = [(0, num_keys), (num_keys // 3, num_keys), (0, num_keys // 2)]
    out, lse, stats = attend(queries, [[_core.Part(keys, values, b, e)] for b, e in ranges])
    expected = twin(queries, [[ExactPart(keys, values, b, e)] for b, e in ranges])
    torch.testing.assert_close(out, expected[0], rtol=1e-4, atol=OUT_TOLERANCE)
    torch.testing.assert_close(lse, expected[1], rtol=1e-5, atol=LSE_TOLERANCE)
    assert stats.num_visible == stats.num_scored == 6 * sum(e - b for b, e in ranges)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_taken_once_serve_many_calls(dtype: torch.dtype) -> None:
    _, keys, values = gapped(1500, dtype=dtype)
    parts = [[_core.Part(keys, values, 0, end, code(keys))] for end in (1500, 900, 3)]
    wide = normal(3, 6, 64, seed=4, dtype=dtype)
    queries, out, lse = wide[:, :4], torch.empty(3, 4, 64), torch.empty(3, 4)  # sequences lie apart
    rows = _core.DecodeRows(queries, out, lse)
    for seed in (5, 6):
        wide.copy_(normal(3, 6, 64, seed=seed))
        stats = rows.attend(parts, SCALE, _core.Budget(exact_keys=512))
        expected = attend(queries.contiguous(), parts)
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])
        assert stats.num_scored == expected[2].num_scored


@pytest.mark.parametrize("group", [1, 3, 7, 8, 9, 20])
def test_any_group_size_is_served(level: str, group: int) -> None:
    queries, keys, values = gapped(2500, group=group)
    for codes, tolerance in ((None, OUT_TOLERANCE), (code(keys), 1e-3)):
        out, _, _ = attend(queries, [[_core.Part(keys, values, 0, 2500, codes)]], beta=15.0)
        expected = twin(queries, [[ExactPart(keys, values, 0, 2500)]])
        torch.testing.assert_close(out, expected[0], rtol=1e-3, atol=tolerance)


def test_int8_parts_agree_with_the_twin(level: str) -> None:
    keys = torch.randint(-127, 128, (2, 700, 64), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    values = keys.flip(1).contiguous()
    scales = normal(2, 700, seed=2).abs() / 64
    queries = normal(1, 4, 64, seed=3)
    out, lse, _ = attend(queries, [[_core.Part(keys, values, 5, 690, None, scales, scales)]])
    expected = twin(queries, [[ExactPart(keys, values, 5, 690, scales, scales)]])
    torch.testing.assert_close(out, expected[0], rtol=1e-4, atol=OUT_TOLERANCE)
    torch.testing.assert_close(lse, expected[1], rtol=1e-5, atol=LSE_TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("head_dim", [64, 96])
def test_searched_parts_come_close_to_full_attention(level: str, dtype: torch.dtype, bits: int, head_dim: int) -> None:
    queries, keys, values = gapped(5000, head_dim, dtype=dtype)
    out, lse, stats = attend(queries, [[_core.Part(keys, values, 0, 5000, code(keys, bits))]], beta=12.0)
    expected = twin(queries, [[ExactPart(keys, values, 0, 5000)]])
    torch.testing.assert_close(out, expected[0], rtol=0, atol=BETA_TOLERANCE)
    torch.testing.assert_close(lse, expected[1], rtol=0, atol=BETA_TOLERANCE)
    assert 0 < stats.num_retrieved <= stats.num_scored < stats.num_visible


def test_levels_keep_the_same_keys() -> None:
    queries, keys, values = gapped(9000, dtype=torch.bfloat16)
    part, best = _core.Part(keys, values, 0, 9000, code(keys)), _core.simd_level()
    results = {}
    for name in LEVELS:
        try:
            _core.set_simd_level(name)
        except ValueError:
            continue
        out, _, stats = attend(queries, [[part]], rest=0.0)
        results[name] = (out, stats.num_retrieved)
    _core.set_simd_level(best)
    for out, num_retrieved in results.values():
        torch.testing.assert_close(out, results["scalar"][0], rtol=0, atol=OUT_TOLERANCE)
        assert num_retrieved == pytest.approx(results["scalar"][1], abs=2)  # a key on the border may fall either way


# Tables are of three bytes of a code: one, two or none may be left over.
@pytest.mark.parametrize(
    ("head_dim", "bits"), [(8, 1), (16, 1), (24, 1), (40, 1), (56, 2), (64, 2), (128, 3), (256, 4)]
)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7])
def test_codes_of_any_size_find_the_best(level: str, head_dim: int, bits: int, group: int) -> None:
    queries, keys, values = gapped(3000, head_dim, 1, group)
    part = _core.Part(keys, values, 0, 3000, code(keys, bits))
    positions, scores = torch.empty(group, 10, dtype=torch.int64), torch.empty(group, 10)
    stats = _core.search(queries[0], part, 10, positions, scores)
    expected = (queries[0] @ keys[0].T).topk(10)
    assert torch.equal(positions, expected.indices)
    torch.testing.assert_close(scores, expected.values, rtol=1e-5, atol=1e-4)
    if bits > 1:
        assert stats.num_scored < 0.75 * group * 3000
    best = _core.simd_level()
    _core.set_simd_level("scalar")
    plain = _core.search(queries[0], part, 10, positions, scores)
    _core.set_simd_level(best)
    assert stats.num_scored == pytest.approx(plain.num_scored, abs=2 * group)  # all levels have the same bounds


@pytest.mark.parametrize("num_keys", [1, 127, 511, 2048, 2049, 6000])
@pytest.mark.parametrize("kind", ["random", "equal", "duplicates", "zero"])
def test_retrieving_everything_is_full_attention(num_keys: int, kind: str) -> None:
    keys = normal(2, num_keys, 64, seed=num_keys)
    if kind == "equal":
        keys[:] = keys[:, :1].clone()
    elif kind == "duplicates":
        keys[:] = keys[:, torch.arange(num_keys) % 7 % num_keys].clone()
    elif kind == "zero":
        keys[:] = 0.0
    values, queries = normal(2, num_keys, 64, seed=5), normal(2, 4, 64, seed=6)
    part = _core.Part(keys, values, 0, num_keys, code(keys, chunk=777))
    expected = twin(queries, [[ExactPart(keys, values, 0, num_keys)]] * 2)
    for budget in ({"k": num_keys}, {"beta": 1e9, "deviations": 1e3, "rest": 0.0}):
        out, lse, stats = attend(queries, [[part]] * 2, **budget)
        torch.testing.assert_close(out, expected[0], rtol=1e-4, atol=OUT_TOLERANCE)
        torch.testing.assert_close(lse, expected[1], rtol=1e-5, atol=LSE_TOLERANCE)
        assert stats.num_visible == 2 * 4 * num_keys


def test_parts_merge_as_one_context() -> None:
    queries, keys, values = gapped(6000, dtype=torch.bfloat16)
    codes = code(keys[:, 128:5000].contiguous())
    middle = _core.Part(keys[:, 128:5000], values[:, 128:5000], 0, 4872, codes)
    out, lse, _ = attend(
        queries, [[_core.Part(keys, values, 0, 128), middle, _core.Part(keys, values, 5000, 6000)]], beta=14.0
    )
    expected = twin(queries, [[ExactPart(keys, values, 0, 6000)]])
    torch.testing.assert_close(out, expected[0], rtol=0, atol=2e-3)
    torch.testing.assert_close(lse, expected[1], rtol=0, atol=2e-3)


@pytest.mark.parametrize(("begin", "end"), [(0, 1), (0, 600), (63, 2049), (2048, 4096), (1999, 5000), (4999, 5000)])
def test_begin_and_end_of_a_searched_part_are_kept(begin: int, end: int) -> None:
    queries, keys, values = gapped(5000)
    part = _core.Part(keys, values, 0, 5000, code(keys))
    part.begin, part.end = begin, end
    assert (part.begin, part.end) == (begin, end)
    out, lse, stats = attend(queries, [[part]], beta=14.0)
    expected = twin(queries, [[ExactPart(keys, values, begin, end)]])
    torch.testing.assert_close(out, expected[0], rtol=0, atol=2e-3)
    torch.testing.assert_close(lse, expected[1], rtol=0, atol=2e-3)
    assert stats.num_visible == 4 * (end - begin)


def test_keys_behind_the_codes_are_attended_exactly() -> None:
    queries, keys, values = gapped(4000)
    part = _core.Part(keys, values, 0, 4000, code(keys[:, :3000].contiguous()))
    out, _, _ = attend(queries, [[part]], beta=14.0)
    expected = twin(queries, [[ExactPart(keys, values, 0, 4000)]])
    torch.testing.assert_close(out, expected[0], rtol=0, atol=2e-3)


def test_a_batch_equals_its_sequences_one_by_one() -> None:
    queries, keys, values = gapped(5000, group=3)
    batch = torch.cat([queries, queries.flip(1), queries * 0.5])
    codes = code(keys)
    parts = [[_core.Part(keys, values, 0, end, codes)] for end in (5000, 1000, 3000)]
    together = attend(batch, parts)
    for i in range(3):
        alone = attend(batch[i : i + 1].contiguous(), parts[i : i + 1])
        torch.testing.assert_close(together[0][i : i + 1], alone[0], rtol=0, atol=0)
        torch.testing.assert_close(together[1][i : i + 1], alone[1], rtol=0, atol=0)


def test_the_number_of_threads_changes_nothing() -> None:
    queries, keys, values = gapped(20_000)
    part, before = _core.Part(keys, values, 0, 20_000, code(keys)), _core.num_threads()
    results = []
    for count in (1, 2, 3):
        _core.set_num_threads(count)
        assert _core.num_threads() == count
        results.append(attend(queries, [[part]])[0])
    _core.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_sequence_without_keys_is_empty() -> None:
    queries, keys, values = gapped(100)
    for parts in ([], [_core.Part(keys, values, 7, 7)]):
        out, lse, stats = attend(queries, [parts])
        assert torch.equal(out, torch.zeros_like(out))
        assert (lse == -torch.inf).all()
        assert stats.num_visible == 0


@pytest.mark.parametrize("k", [1, 50, 3000])
def test_a_fixed_k_takes_the_k_best(k: int) -> None:
    queries, keys, values = gapped(3000, num_kv_heads=1, group=1)
    out, _, stats = attend(queries, [[_core.Part(keys, values, 0, 3000, code(keys))]], k=k)
    best = torch.topk((keys[0] @ queries[0, 0]), k).indices
    expected = torch.softmax(keys[0, best] @ queries[0, 0] * SCALE, 0) @ values[0, best]
    torch.testing.assert_close(out[0, 0], expected, rtol=0, atol=1e-4)
    assert stats.num_retrieved == k


def wide(num_keys: int, head_dim: int, num_seqs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries to which all keys matter about alike, keys and values."""
    keys, queries = normal(2, num_keys, head_dim, seed=1), normal(num_seqs, 4, head_dim, seed=2) * 0.5
    topics = normal(2, 20, head_dim, seed=4).repeat_interleave(num_keys // 20, dim=1)
    return queries, keys, topics + 0.3 * normal(2, num_keys, head_dim, seed=3)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_head_that_looks_widely_draws_its_keys(level: str, head_dim: int) -> None:
    queries, keys, values = wide(20_000, head_dim, 4)
    expected = twin(queries, [[ExactPart(keys, values, 100, 19_950)]] * 4)
    parts = [[_core.Part(keys, values, 100, 19_950, code(keys))]] * 4
    out, lse, stats = attend(queries, parts, rest_keys=2048)
    error = (out - expected[0]).norm(dim=-1) / expected[0].norm(dim=-1)
    assert error.mean() < 0.06
    # A sample of 2000 keys is off by 2 %, now and then by four times that.
    torch.testing.assert_close(lse, expected[1], rtol=0, atol=0.08)
    assert 2048 * 8 < stats.num_drawn < 2 * 2048 * 8  # the two heads of a group share some
    assert stats.num_scored < 0.1 * stats.num_drawn  # weighed by estimate
    assert torch.equal(attend(queries, parts, rest_keys=2048)[0], out)  # drawn alike for the same step
    assert attend(queries, parts, rest=0.0, max_keys=20_000)[2].num_drawn == 0


@pytest.mark.parametrize("sharpness", [1.0, 2.2])  # at the latter weights by estimate are 10 % too large on average
def test_what_is_drawn_is_right_on_average(level: str, sharpness: float) -> None:
    queries, keys, values = wide(20_000, 64, 100)
    queries *= sharpness
    expected = twin(queries, [[ExactPart(keys, values, 0, 20_000)]] * 100)
    out, lse, stats = attend(queries, [[_core.Part(keys, values, 0, 20_000, code(keys))]] * 100, rest_keys=200)
    assert stats.num_scored < 0.5 * stats.num_drawn
    for drawn, exact in ((out.flatten(1), expected[0].flatten(1)), (lse, expected[1])):
        bias, spread = (drawn - exact).mean(), (drawn - exact).std() / drawn.numel() ** 0.5
        assert bias.abs() < 5 * spread + 1e-3


def test_what_is_drawn_is_scored_where_estimates_are_poor(level: str) -> None:
    """Errors of half a nat and more: weights by estimate would be off, and cut off at what is taken for certain."""
    queries, keys, values = wide(20_000, 64, 60)
    queries = 4 * queries
    expected = twin(queries, [[ExactPart(keys, values, 0, 20_000)]] * 60)
    out, lse, stats = attend(queries, [[_core.Part(keys, values, 0, 20_000, code(keys, 1))]] * 60, rest_keys=1000)
    assert stats.num_scored > stats.num_drawn > 60 * 500
    bias, spread = (lse - expected[1]).mean(), (lse - expected[1]).std() / lse.numel() ** 0.5
    assert bias.abs() < 5 * spread + 1e-3
    assert ((out - expected[0]).norm(dim=-1) / expected[0].norm(dim=-1)).mean() < 0.2


def test_sharp_head_beside_a_wide_one(level: str) -> None:
    """Of the two heads of a group one draws, and weighs by estimate; what the other looks for is scored."""
    queries, keys, values = wide(20_000, 64, 30)
    queries[:, 1::2] = torch.nn.functional.normalize(keys[:, 7000:7030].transpose(0, 1), dim=-1) * 24
    expected = twin(queries, [[ExactPart(keys, values, 0, 20_000)]] * 30)
    out, lse, stats = attend(queries, [[_core.Part(keys, values, 0, 20_000, code(keys))]] * 30, rest_keys=2048)
    error = (out - expected[0]).norm(dim=-1) / expected[0].norm(dim=-1)
    assert error[:, 1::2].max() < 0.01
    assert error[:, ::2].mean() < 0.06
    assert stats.num_drawn > 30 * 2 * 1024
    assert stats.num_scored < 0.5 * stats.num_drawn
    torch.testing.assert_close(lse, expected[1], rtol=0, atol=0.1)


@pytest.mark.parametrize("rest_keys", [1500, 6000])
def test_draws_beyond_the_budget_stand_for_more(level: str, rest_keys: int) -> None:
    queries, keys, values = wide(20_000, 64, 100)
    expected = twin(queries, [[ExactPart(keys, values, 0, 20_000)]] * 100)
    parts = [[_core.Part(keys, values, 0, 20_000, code(keys))]] * 100
    _, lse, stats = attend(queries, parts, rest_keys=rest_keys, max_keys=1000)
    assert stats.num_retrieved <= 1000 * lse.numel()
    bias, spread = (lse - expected[1]).mean(), (lse - expected[1]).std() / lse.numel() ** 0.5
    assert bias.abs() < 5 * spread + 2e-3


def test_more_draws_come_closer() -> None:
    queries, keys, values = wide(20_000, 64, 8)
    expected = twin(queries, [[ExactPart(keys, values, 0, 20_000)]] * 8)[0]
    parts = [[_core.Part(keys, values, 0, 20_000, code(keys))]] * 8
    errors = [(attend(queries, parts, rest_keys=n)[0] - expected).norm() for n in (100, 800, 6400)]
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2]


def test_few_keys_are_attended_exactly() -> None:
    queries, keys, values = wide(6000, 64, 2)
    parts = [[_core.Part(keys, values, begin, end, code(keys)) for begin, end in ((0, 2000), (2000, 6000))]] * 2
    for least, is_exact in ((6000, False), (6001, True)):
        out, lse, stats = attend(queries, parts, exact_keys=least)
        assert (stats.num_scored == stats.num_visible) == is_exact
        if is_exact:
            expected = twin(queries, [[ExactPart(keys, values, 0, 6000)]] * 2)
            torch.testing.assert_close(out, expected[0], rtol=1e-4, atol=OUT_TOLERANCE)
            torch.testing.assert_close(lse, expected[1], rtol=1e-5, atol=LSE_TOLERANCE)


def test_max_keys_is_not_exceeded() -> None:
    keys, values, queries = normal(1, 8000, 64, seed=1), normal(1, 8000, 64, seed=2), normal(1, 1, 64, seed=3)
    _, _, stats = attend(queries, [[_core.Part(keys, values, 0, 8000, code(keys))]], max_keys=300, beta=50.0)
    assert stats.num_retrieved <= 300


def test_a_search_looks_at_the_head_it_is_told() -> None:
    queries, keys, values = gapped(3000, num_kv_heads=2, group=3)
    part = _core.Part(keys, values, 0, 3000, code(keys))
    for head in (0, 1):
        rows = queries[0, 3 * head : 3 * head + 3].contiguous()
        positions, scores = torch.empty(3, 20, dtype=torch.int64), torch.empty(3, 20)
        _core.search(rows, part, 20, positions, scores, kv_head=head)
        expected = torch.topk(rows @ keys[head].T, 20)
        assert (positions.sort().values == expected.indices.sort().values).float().mean() > 0.95
    with pytest.raises(ValueError, match="kv_head"):
        _core.search(rows, part, 20, positions, scores, kv_head=2)


def test_search_of_a_part_without_codes_is_exact(level: str) -> None:
    queries, keys, values = gapped(3000, num_kv_heads=1, group=10)
    positions, scores = torch.empty(10, 20, dtype=torch.int64), torch.empty(10, 20)
    _core.search(queries[0], _core.Part(keys, values, 100, 2900), 20, positions, scores)
    expected = torch.topk(queries[0] @ keys[0, 100:2900].T, 20)
    torch.testing.assert_close(scores, expected.values, rtol=1e-5, atol=1e-4)
    assert (positions == expected.indices + 100).float().mean() > 0.98  # near ties may change places


@pytest.mark.parametrize("bits", [1, 4])
def test_saved_codes_answer_as_before(bits: int) -> None:
    queries, keys, values = gapped(5000)
    codes = code(keys, bits)
    loaded = _core.LayerCodes.load(codes.save())
    assert (loaded.num_keys, loaded.bits, loaded.nbytes) == (5000, bits, codes.nbytes)
    first, second = (attend(queries, [[_core.Part(keys, values, 0, 5000, c)]])[0] for c in (codes, loaded))
    assert torch.equal(first, second)
    loaded.append(keys[:, :100])
    assert loaded.num_keys == 5100


def test_damaged_codes_are_refused() -> None:
    data = code(normal(2, 3000, 64, seed=1)).save()
    for damaged in (b"", b"RBQ", data[:-1], data + b"x", b"X" + data[1:], data[: len(data) // 2]):
        with pytest.raises(ValueError):
            _core.LayerCodes.load(damaged)


def test_index_bytes_stay_below_thirty_percent() -> None:
    keys = normal(2, 8192, 64, seed=1, dtype=torch.bfloat16)
    assert code(keys).nbytes <= 0.3 * 2 * keys.numel() * keys.element_size()


@pytest.mark.parametrize(
    ("num_heads", "head_dim", "bits", "num_keys"),
    [(3, 24, 1, 1), (1, 64, 2, 2049), (8, 128, 4, 5000), (2, 64, 3, 70_000)],
)
@pytest.mark.parametrize("is_stretched", [False, True])
def test_codes_take_no_more_bytes_than_foretold(
    num_heads: int, head_dim: int, bits: int, num_keys: int, is_stretched: bool
) -> None:
    same = torch.eye(head_dim).expand(num_heads, head_dim, head_dim).contiguous()
    codes = _core.LayerCodes(num_heads, head_dim, bits, 0, *((same, same) if is_stretched else ()))
    codes.append(torch.randn(num_heads, num_keys, head_dim))
    most = _core.LayerCodes.most_bytes(num_heads, head_dim, bits, num_keys, is_stretched)
    assert codes.nbytes <= most
    if num_keys == 70_000:
        assert most <= 1.15 * codes.nbytes
    with pytest.raises(ValueError, match="head_dim"):
        _core.LayerCodes.most_bytes(num_heads, 7, bits, num_keys)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused_and_harms_nothing(bad: float) -> None:
    queries, keys, values = gapped(3000)
    codes = code(keys)
    spoiled = keys.clone()
    spoiled[1, 2047, 63] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        codes.append(spoiled)
    assert codes.num_keys == 3000
    spoiled_queries = queries.clone()
    spoiled_queries[0, 0, 0] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        attend(spoiled_queries, [[_core.Part(keys, values, 0, 3000, codes)]])


def test_wrong_shapes_dtypes_and_ranges_are_refused() -> None:
    queries, keys, values = gapped(100)
    part = _core.Part(keys, values, 0, 100)
    refused = (
        lambda: _core.Part(keys, values[:, :99], 0, 99),
        lambda: _core.Part(keys, values.bfloat16(), 0, 100),
        lambda: _core.Part(keys.double(), values.double(), 0, 100),
        lambda: _core.Part(keys.transpose(1, 2), values.transpose(1, 2), 0, 64),
        lambda: _core.Part(keys, values, 0, 101),
        lambda: _core.Part(keys, values, 5, 4),
        lambda: _core.Part(keys, values, 0, 100, _core.LayerCodes(1, 64)),
        lambda: _core.LayerCodes(2, 20),
        lambda: _core.LayerCodes(2, 64, 5),
        lambda: _core.LayerCodes(2, 64).append(keys[:1]),
        lambda: _core.Budget(beta=-1.0),
        lambda: attend(queries, []),
        lambda: attend(queries[:, :3].contiguous(), [[part]]),
        lambda: attend(queries[..., :32].contiguous(), [[part]]),
        lambda: _core.DecodeRows(queries.transpose(1, 2), torch.empty(1, 64, 4), torch.empty(1, 64)),
        lambda: _core.DecodeRows(queries.double(), torch.empty(1, 4, 64), torch.empty(1, 4)),
        lambda: _core.DecodeRows(queries, torch.empty(1, 4, 32), torch.empty(1, 4)),
        lambda: _core.DecodeRows(queries, torch.empty(1, 4, 64), torch.empty(4)),
        lambda: setattr(part, "end", 101),
    )
    for call in refused:
        with pytest.raises((ValueError, TypeError)):
            call()
    with pytest.raises(TypeError):  # outputs must be the caller's own memory: nothing is converted
        _core.attend_layer(queries, [[part]], SCALE, torch.empty(1, 4, 64).bfloat16(), torch.empty(1, 4))


def test_sizes_and_ranges_at_random() -> None:
    """Fuzz: any mixture of exact, searched and half-coded parts is full attention when everything is retrieved."""
    for seed in range(40):
        print(f"seed {seed}")
        generator = torch.Generator().manual_seed(seed)
        pick = partial(whole_number, generator)
        head_dim, num_kv_heads, group = 8 * pick(1, 17), pick(1, 4), pick(1, 6)
        dtype = DTYPES[pick(0, 3)]
        parts, expected = [], []
        for _ in range(pick(0, 4)):
            num_keys = pick(0, 4500)
            keys = normal(num_kv_heads, num_keys, head_dim, seed=seed, dtype=dtype)
            values = normal(num_kv_heads, num_keys, head_dim, seed=seed + 1, dtype=dtype)
            codes = (
                code(keys[:, : pick(0, num_keys + 1)].contiguous(), pick(1, 5), pick(1, 2000)) if pick(0, 2) else None
            )
            begin = pick(0, num_keys + 1)
            end = pick(begin, num_keys + 1)
            parts.append(_core.Part(keys, values, begin, end, codes))
            expected.append(ExactPart(keys, values, begin, end))
        queries = normal(1, num_kv_heads * group, head_dim, seed=seed + 2, dtype=dtype)
        out, lse, _ = attend(queries, [parts], beta=1e9, deviations=1e3, max_keys=1_000_000)
        expected_out, expected_lse = twin(queries, [expected])
        torch.testing.assert_close(out, expected_out, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-4)


def test_two_threads_attend_while_a_third_appends() -> None:
    queries, keys, values = gapped(12_000)
    codes = code(keys[:, :2000].contiguous())
    part = _core.Part(keys, values, 0, 12_000, codes)
    expected = twin(queries, [[ExactPart(keys, values, 0, 12_000)]])[0]
    is_done, errors = threading.Event(), []

    def search() -> None:
        try:
            while not is_done.is_set():
                torch.testing.assert_close(
                    attend(queries, [[part]], beta=14.0, rest=0.0)[0], expected, rtol=0, atol=2e-3
                )
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    for start in range(2000, 12_000, 100):
        codes.append(keys[:, start : start + 100])
    is_done.set()
    for thread in threads:
        thread.join(timeout=60)
    assert errors == []
    assert codes.num_keys == 12_000


def test_a_missing_core_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(name: str) -> None:
        raise ImportError(name)

    native.core.cache_clear()
    monkeypatch.setattr(native.importlib, "import_module", refuse)
    assert native.core() is None
    assert native.core() is None
    native.core.cache_clear()
    assert len([record for record in caplog.records if "core is missing" in record.message]) == 1
