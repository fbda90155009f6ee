"""Runs of neighbours that the core leaves out by their means: what is left out must not matter. Seeds are fixed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

_core = pytest.importorskip("retrieval._core")

NUM_KEYS, HEAD_DIM, NUM_KV_HEADS, GROUP = 24_000, 64, 2, 2
RUN_KEYS = 32
SCALE = HEAD_DIM**-0.5


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def topical(num_keys: int = NUM_KEYS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values `[kv_heads, num_keys, d]` of which each run of 32 shares a topic."""
    topics = normal(NUM_KV_HEADS, num_keys // RUN_KEYS + 1, HEAD_DIM, seed=seed).repeat_interleave(RUN_KEYS, dim=1)
    keys = (topics[:, :num_keys] + normal(NUM_KV_HEADS, num_keys, HEAD_DIM, seed=seed + 1)) / 2**0.5
    return keys, normal(NUM_KV_HEADS, num_keys, HEAD_DIM, seed=seed + 2)


def questions(keys: Tensor, num: int, sharpness: float, seed: int = 9) -> Tensor:
    """Queries `[num, q_heads, d]`, each looking for one key."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, keys.shape[1], (NUM_KV_HEADS, num * GROUP), generator=generator)
    rows = torch.stack([keys[h][targets[h]] for h in range(NUM_KV_HEADS)]) * sharpness
    return rows.reshape(NUM_KV_HEADS, num, GROUP, HEAD_DIM).transpose(0, 1).reshape(num, -1, HEAD_DIM).contiguous()


def codes_of(keys: Tensor, chunk: int = 5000) -> Any:
    codes = _core.LayerCodes(keys.shape[0], keys.shape[2], 2, 0)
    for start in range(0, keys.shape[1], chunk):
        codes.append(keys[:, start : start + chunk].contiguous())
    return codes


def attend(queries: Tensor, parts: list[Any], **budget: float) -> tuple[Tensor, Tensor, list[Any]]:
    """Each row of `queries` by itself, as a decode step does."""
    out, lse = torch.empty(queries.shape), torch.empty(queries.shape[:2])
    budget = {"reach_products": 1 << 20, **budget}  # all searches here are long ones
    stats = [
        _core.attend_layer(queries[i : i + 1], [parts], SCALE, out[i : i + 1], lse[i : i + 1], _core.Budget(**budget))
        for i in range(len(queries))
    ]
    return out, lse, stats


def exact(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    grouped = queries.unflatten(1, (NUM_KV_HEADS, GROUP))
    logits = SCALE * torch.einsum("nhgd,hkd->nhgk", grouped, keys)
    out = torch.einsum("nhgk,hkd->nhgd", logits.softmax(dim=3), values)
    return out.flatten(1, 2), logits.logsumexp(dim=3).flatten(1)


def errors(out: Tensor, expected: Tensor) -> Tensor:
    return (out - expected).norm(dim=2) / expected.norm(dim=2)


def bytes_read(stats: list[Any]) -> int:
    return sum(each.bytes_read for each in stats)


def test_topics_that_are_not_asked_for_are_left_out(level: str) -> None:
    keys, values = topical()
    queries, part = questions(keys, 6, 4.0), _core.Part(keys, values, 0, NUM_KEYS, codes_of(keys))
    expected, expected_lse = exact(queries, keys, values)
    out, lse, stats = attend(queries, [part])
    _, _, everything = attend(queries, [part], reach=0)
    assert errors(out, expected).max() < 0.02
    assert (lse - expected_lse).abs().max() < 0.02
    assert bytes_read(stats) < 0.65 * bytes_read(everything)


def test_key_that_its_run_says_nothing_about_is_found() -> None:
    """Every key for itself: a run's mean is noise, and the key asked for lies far from it."""
    keys, values = normal(NUM_KV_HEADS, NUM_KEYS, HEAD_DIM, seed=3), normal(NUM_KV_HEADS, NUM_KEYS, HEAD_DIM, seed=4)
    codes = codes_of(keys)
    for sharpness in (2.0, 4.0, 8.0):
        queries = questions(keys, 12, sharpness)
        expected, _ = exact(queries, keys, values)
        out, _, _ = attend(queries, [_core.Part(keys, values, 0, NUM_KEYS, codes)])
        plain, _, _ = attend(queries, [_core.Part(keys, values, 0, NUM_KEYS, codes)], reach=0)
        assert errors(out, expected).max() < errors(plain, expected).max() + 0.01


def test_long_key_among_short_ones_is_found() -> None:
    keys, values = topical()
    place = 12_345
    keys[:, place] = 12.0 * normal(HEAD_DIM, seed=5)
    queries = (keys[0, place] / 12.0).expand(1, NUM_KV_HEADS * GROUP, HEAD_DIM).contiguous()
    expected, _ = exact(queries, keys, values)
    out, _, _ = attend(queries, [_core.Part(keys, values, 0, NUM_KEYS, codes_of(keys))])
    assert errors(out, expected).max() < 1e-3


def test_what_the_window_outweighs_is_hardly_looked_at() -> None:
    keys, values = topical()
    queries = questions(keys, 4, 1.0)
    near = queries.unflatten(1, (NUM_KV_HEADS, GROUP)).mean(dim=2).transpose(0, 1) * 8.0  # [kv_heads, 4, d]
    near_values = normal(NUM_KV_HEADS, 4, HEAD_DIM, seed=6)
    parts = [_core.Part(near.contiguous(), near_values, 0, 4), _core.Part(keys, values, 0, NUM_KEYS, codes_of(keys))]
    expected, expected_lse = exact(queries, torch.cat((near, keys), dim=1), torch.cat((near_values, values), dim=1))
    out, lse, stats = attend(queries, parts)
    _, _, everything = attend(queries, parts, reach=0)
    assert errors(out, expected).max() < 1e-3
    assert torch.allclose(lse, expected_lse, atol=1e-3)
    assert bytes_read(stats) < 0.4 * bytes_read(everything)


def test_groups_that_are_drawn_stand_for_the_others() -> None:
    """A head that looks at everything: over many steps the weight that draws stand for is that of all keys."""
    keys, values = topical(60_000)
    queries = questions(keys, 150, 0.8)
    _, expected = exact(queries, keys, values)
    part = _core.Part(keys, values, 0, 60_000, codes_of(keys))
    _, lse, stats = attend(queries, [part], rest_keys=400)
    _, _, everything = attend(queries, [part], rest_keys=400, reach=0)
    assert all(each.num_drawn > 0 for each in stats)
    assert bytes_read(stats) < 0.6 * bytes_read(everything)
    ratios = (lse - expected).exp()
    assert abs(ratios.mean() - 1) < 0.015
    assert ratios.std() < 0.15


def test_window_does_not_hide_that_a_head_looks_widely() -> None:
    """No single key comes near the window's best one; all together they outweigh it."""
    keys, values = topical(60_000)
    queries = 0.5 * normal(20, NUM_KV_HEADS * GROUP, HEAD_DIM, seed=13)
    grouped = queries.unflatten(1, (NUM_KV_HEADS, GROUP)).transpose(0, 1)  # [kv_heads, 20, group, d]
    for i in range(len(queries)):
        near = 12.0 / SCALE * torch.linalg.pinv(grouped[:, i]).sum(dim=2)[:, None]  # 12 nats for both heads of a group
        near_values = normal(NUM_KV_HEADS, 1, HEAD_DIM, seed=6)
        parts = [_core.Part(near, near_values, 0, 1), _core.Part(keys, values, 0, 60_000, codes_of(keys, 60_000))]
        every = torch.cat((near, keys), dim=1), torch.cat((near_values, values), dim=1)
        _, expected = exact(queries[i : i + 1], *every)
        _, lse, stats = attend(queries[i : i + 1], parts)
        assert (expected > 12.0 + 0.2).all()  # a fifth of the weight at least is not the window's
        assert stats[0].num_drawn > 0
        assert (lse - expected).abs().max() < 0.1


def test_more_candidates_than_the_budget_has() -> None:
    keys, values = topical()
    queries, part = questions(keys, 6, 3.0), _core.Part(keys, values, 0, NUM_KEYS, codes_of(keys))
    expected, _ = exact(queries, keys, values)
    budget: dict[str, Any] = {"rest": 0.0, "beta": 40.0, "max_keys": 3000}
    out, _, stats = attend(queries, [part], **budget)
    plain, _, _ = attend(queries, [part], reach=0, **budget)
    assert all(each.num_scored <= (3000 + 64) * NUM_KV_HEADS * GROUP for each in stats)
    assert errors(out, expected).mean() < errors(plain, expected).mean() + 0.01


@pytest.mark.parametrize("end", [16_384, 17_001, 23_999])
def test_prefix_of_two_segments(end: int) -> None:
    """A part that ends inside a run, behind one whose last run is not full."""
    keys, values = topical()
    queries = questions(keys[:, :end], 4, 4.0)
    first = 9_050
    parts = [
        _core.Part(keys[:, :first].contiguous(), values[:, :first].contiguous(), 128, first, codes_of(keys[:, :first])),
        _core.Part(
            keys[:, first:].contiguous(), values[:, first:].contiguous(), 0, end - first, codes_of(keys[:, first:])
        ),
    ]
    visible = slice(128, end)
    expected, _ = exact(queries, keys[:, visible], values[:, visible])
    out, _, _ = attend(queries, parts)
    plain, _, _ = attend(queries, parts, reach=0)
    assert errors(out, expected).max() < errors(plain, expected).max() + 0.01


def test_pieces_and_files_change_nothing() -> None:
    keys, values = topical()
    queries = questions(keys, 4, 4.0)
    whole, pieces = codes_of(keys, NUM_KEYS), _core.LayerCodes(NUM_KV_HEADS, HEAD_DIM, 2, 0)
    for start, end in ((0, 2048), (2048, 2051), (2051, 2079), (2079, 2080), (2080, 9999), (9999, NUM_KEYS)):
        pieces.append(keys[:, start:end].contiguous())
    assert pieces.save() == whole.save()
    answers = []
    for codes in (whole, pieces, _core.LayerCodes.load(whole.save())):
        out, lse, stats = attend(queries, [_core.Part(keys, values, 0, NUM_KEYS, codes)])
        answers.append((out, lse, bytes_read(stats)))
    for out, lse, num_bytes in answers[1:]:
        assert torch.equal(out, answers[0][0])
        assert torch.equal(lse, answers[0][1])
        assert num_bytes == answers[0][2]


def test_run_that_a_file_cuts_in_two_is_continued() -> None:
    keys, _ = topical()
    first = _core.LayerCodes(NUM_KV_HEADS, HEAD_DIM, 2, 0)
    first.append(keys[:, :9_013].contiguous())
    loaded = _core.LayerCodes.load(first.save())
    loaded.append(keys[:, 9_013:].contiguous())
    assert loaded.save() == codes_of(keys, NUM_KEYS).save()


def test_result_does_not_depend_on_threads() -> None:
    keys, values = topical()
    queries, part = questions(keys, 4, 1.5), _core.Part(keys, values, 0, NUM_KEYS, codes_of(keys))
    before, answers = _core.num_threads(), []
    try:
        for count in (1, 2, 3):
            _core.set_num_threads(count)
            answers.append(attend(queries, [part])[:2])
    finally:
        _core.set_num_threads(before)
    for out, lse in answers[1:]:
        assert torch.equal(out, answers[0][0])
        assert torch.equal(lse, answers[0][1])


def test_result_does_not_depend_on_calls_before() -> None:
    keys, values = topical()
    codes = codes_of(keys)
    parts = [_core.Part(keys, values, 0, NUM_KEYS, codes)]
    narrow, wide = questions(keys, 4, 4.0), questions(keys, 2, 0.2)
    before = attend(narrow, parts)
    long_lists = attend(wide, parts, rest=0.0, beta=1000.0)[2]
    assert sum(each.num_retrieved for each in long_lists) > NUM_KEYS  # lists of tasks grow far beyond the usual
    after = attend(narrow, parts)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert bytes_read(before[2]) == bytes_read(after[2])


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_any_number_of_bits(bits: int) -> None:
    keys, values = topical()
    codes = _core.LayerCodes(NUM_KV_HEADS, HEAD_DIM, bits, 0)
    codes.append(keys)
    queries = questions(keys, 4, 4.0)
    out, _, _ = attend(queries, [_core.Part(keys, values, 0, NUM_KEYS, codes)])
    assert errors(out, exact(queries, keys, values)[0]).max() < 0.03


def test_equal_keys_and_empty_queries() -> None:
    keys, values = torch.ones(NUM_KV_HEADS, NUM_KEYS, HEAD_DIM), normal(NUM_KV_HEADS, NUM_KEYS, HEAD_DIM, seed=7)
    part = _core.Part(keys, values, 0, NUM_KEYS, codes_of(keys))
    for queries in (torch.zeros(1, NUM_KV_HEADS * GROUP, HEAD_DIM), torch.ones(1, NUM_KV_HEADS * GROUP, HEAD_DIM)):
        out, lse, _ = attend(queries, [part])
        expected_lse = exact(queries, keys, values)[1]
        assert torch.isfinite(out).all()
        assert torch.allclose(lse, expected_lse, atol=0.05)


def test_budget_refuses_a_negative_reach() -> None:
    for wrong in ({"reach": -1.0}, {"reach_products": -1}):
        with pytest.raises(ValueError, match="budget"):
            _core.Budget(**wrong)


def test_short_search_scans_every_run() -> None:
    keys, values = topical()
    queries, part = questions(keys, 3, 4.0), _core.Part(keys, values, 0, NUM_KEYS, codes_of(keys))
    out, lse, stats = attend(queries, [part], reach_products=NUM_KEYS * GROUP * HEAD_DIM + 1)
    plain, plain_lse, everything = attend(queries, [part], reach=0)
    assert torch.equal(out, plain)
    assert torch.equal(lse, plain_lse)
    assert bytes_read(stats) == bytes_read(everything)


def test_best_key_that_comes_last_leaves_little_to_score(level: str) -> None:
    """Until it is found, all keys that could matter beside the best one so far are listed."""
    keys, values = normal(1, 60_000, HEAD_DIM, seed=30), normal(1, 60_000, HEAD_DIM, seed=31)
    query = 16.0 * normal(HEAD_DIM, seed=32)
    keys[0, 59_990] = 1.6 * query / query.norm() * HEAD_DIM**0.5
    codes = _core.LayerCodes(1, HEAD_DIM, 2, 0)
    codes.append(keys)
    weights = (SCALE * keys[0] @ query).softmax(dim=0)
    out, _, stats = attend(query[None, None], [_core.Part(keys, values, 0, 60_000, codes)])
    assert errors(out, (weights @ values[0])[None, None]).max() < 1e-3
    assert stats[0].num_scored < 600


def test_what_could_only_just_matter_is_not_looked_for_as_surely_as_the_best() -> None:
    """Estimates off by several nats: by its bound, a key far below the best one could still be near it."""
    keys, values = normal(NUM_KV_HEADS, 60_000, HEAD_DIM, seed=33), normal(NUM_KV_HEADS, 60_000, HEAD_DIM, seed=34)
    part = _core.Part(keys, values, 0, 60_000, codes_of(keys))
    queries = questions(keys, 24, 6.0)
    out, _, stats = attend(queries, [part])
    expected, _ = exact(queries, keys, values)
    assert errors(out, expected).mean() < 0.002
    assert errors(out, expected).max() < 0.05
    assert sum(each.num_scored for each in stats) < 0.01 * sum(each.num_visible for each in stats)


def test_key_that_comes_last_leaves_nothing_to_draw(level: str) -> None:
    """A head looks widely, until far on in the search a key outweighs all that it has drawn."""
    keys, values = 0.3 * normal(1, 60_000, HEAD_DIM, seed=35), normal(1, 60_000, HEAD_DIM, seed=36)
    query = normal(HEAD_DIM, seed=37)
    parts = [_core.Part(keys, values, 0, 60_000, codes_of(keys, 60_000))]
    _, _, before = attend(query[None, None], parts)
    keys[0, 59_990] = 40.0 * query / query.norm()  # 40 nats
    parts = [_core.Part(keys, values, 0, 60_000, codes_of(keys, 60_000))]
    out, lse, after = attend(query[None, None], parts)
    assert before[0].num_drawn > 1000 > before[0].num_scored
    assert errors(out, values[:, 59_990:59_991]).max() < 1e-3
    assert abs(lse.item() - SCALE * (keys[0, 59_990] @ query).item()) < 1e-3
    assert after[0].num_retrieved < 100


def test_levels_take_the_same_keys(level: str) -> None:
    keys, values = topical(40_000)
    part = _core.Part(keys, values, 0, 40_000, codes_of(keys, 40_000))
    queries = torch.cat([questions(keys, 3, sharpness) for sharpness in (0.8, 2.6, 8.0)])
    _, _, stats = attend(queries, [part])
    _core.set_simd_level("scalar")
    _, _, expected = attend(queries, [part])
    for found, plain in zip(stats, expected, strict=True):  # but for where luck begins, which hangs on the best score
        assert found.num_drawn == pytest.approx(plain.num_drawn, rel=0.05)
        assert found.num_scored == pytest.approx(plain.num_scored, rel=0.05)


def test_what_little_weighs_is_drawn(level: str) -> None:
    """Heads that look at a few keys and a little at all: most of the list is left to chance."""
    keys, values = topical(60_000)
    queries = questions(keys, 24, 2.6)
    part = _core.Part(keys, values, 0, 60_000, codes_of(keys, 60_000))
    expected, expected_lse = exact(queries, keys, values)
    out, lse, stats = attend(queries, [part])
    _, _, certain = attend(queries, [part], rest=0)
    assert errors(out, expected).mean() < 0.01
    assert abs((lse - expected_lse).mean()) < 0.003
    assert (lse - expected_lse).square().mean().sqrt() < 0.01
    assert (lse - expected_lse).abs().max() < 0.1
    assert sum(each.num_scored for each in stats) < 0.7 * sum(each.num_scored for each in certain)


def test_what_the_sample_happens_to_hold_does_not_hide_others() -> None:
    """Some groups tell how wide a head looks; one of what was looked for must not stand for many like it. Nor are runs
    left out that hold a key unlike all others."""
    num_keys, step = 150_000, 74  # of 2368 groups, each 74th is looked at first
    query = torch.zeros(HEAD_DIM)
    query[0] = 16.0
    values = normal(1, num_keys, HEAD_DIM, seed=8)
    for i in range(0, 32, 5):
        keys = 0.1 * normal(1, num_keys, HEAD_DIM, seed=20 + i)
        keys[0, :, 0] += 4 / (16.0 * SCALE)  # all together about a hundredth
        place = (step // 2 + i * step) * 64
        keys[0, place : place + 60, 0] += 10 / (16.0 * SCALE)  # each a 400th of the best
        keys[0, 1000 : 1000 + 100 * 1_400 : 1_400, 0] += 10 / (16.0 * SCALE)
        keys[0, 777, 0] += 16 / (16.0 * SCALE)
        codes = _core.LayerCodes(1, HEAD_DIM, 2, 0)
        codes.append(keys)
        weights = (SCALE * keys[0] @ query).softmax(dim=0)
        for reach in (0.0, 6.0):
            out, _, _ = attend(query[None, None], [_core.Part(keys, values, 0, num_keys, codes)], reach=reach)
            assert errors(out, (weights @ values[0])[None, None]).max() < 0.02
