"""The core's attention of a prompt's chunk equals plain softmax attention, whatever the shapes and the storage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from retrieval.prefill import attend_chunk_native, attend_chunk_torch

core = pytest.importorskip("retrieval._core")
pytestmark = pytest.mark.skipif(not core.can_attend_chunk(), reason="needs AMX-BF16 and AVX-512-BF16")

# Against float64 over the same bf16 inputs, values of about 1: weights are rounded to bf16 (2^-8 at most, 0.0018 root
# mean square), which matters most where one or two keys have all the weight.
TOLERANCE = 1e-2
LSE_TOLERANCE = 5e-3  # natural log: the rounded weights' sum


def randn(*shape: int, seed: int = 0, factor: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * factor).bfloat16()


def oracle(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """out and lse of the newest `n` positions, in float64."""
    n, num_keys = queries.shape[1], keys.shape[1]
    group = queries.shape[0] // keys.shape[0]
    k, v = keys.double().repeat_interleave(group, 0), values.double().repeat_interleave(group, 0)
    position, key = torch.arange(num_keys - n, num_keys)[:, None], torch.arange(num_keys)[None]
    is_seen = (key <= position) & (key > position - (window or num_keys))
    scores = (queries.double() @ k.transpose(1, 2) * scale).masked_fill(~is_seen, -torch.inf)
    return (torch.softmax(scores, -1) @ v).float(), torch.logsumexp(scores, -1).float()


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    window: int | None = None,
    cuts: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """By the core; the positions are cut into parts, each inside a larger buffer of NaN."""
    parts = []
    for i, (begin, end) in enumerate(zip((0, *cuts), (*cuts, keys.shape[1]), strict=True)):
        kv = []
        for source in (keys, values):
            buffer = torch.full((keys.shape[0], end - begin + 7 + i, keys.shape[2]), torch.nan, dtype=torch.bfloat16)
            buffer[:, 3 : 3 + end - begin] = source[:, begin:end]
            kv.append(buffer)
        parts.append(core.Part(*kv, 3, 3 + end - begin))
    out, lse = torch.full(queries.shape, torch.nan, dtype=dtype), torch.full(queries.shape[:2], torch.nan)
    core.attend_chunk(queries, parts, queries.shape[1], scale, out, lse, window)
    return out, lse


def check(*args: Any, tolerance: float = TOLERANCE, **options: Any) -> None:
    out, lse = attend(*args, **options)
    window = options.get("window")
    expected_out, expected_lse = oracle(*args[:4], window=window)
    torch.testing.assert_close(out.float(), expected_out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, expected_lse, atol=LSE_TOLERANCE, rtol=1e-5)


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n}-threads")
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = core.num_threads()
    core.set_num_threads(request.param)
    yield request.param
    core.set_num_threads(before)


@pytest.mark.parametrize("num_new", [1, 2, 15, 16, 17, 31, 33, 63, 100, 255, 300])
@pytest.mark.parametrize("past", [0, 1, 31, 500, 1300])
def test_any_chunk_size_equals_plain_attention(num_new: int, past: int) -> None:
    keys, values = randn(2, past + num_new, 64, seed=1), randn(2, past + num_new, 64, seed=2)
    check(randn(4, num_new, 64), keys, values, 64**-0.5)


@pytest.mark.parametrize("head_dim", [8, 16, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (8, 2), (3, 1)], ids=str)
def test_any_geometry_equals_plain_attention(head_dim: int, heads: tuple[int, int], num_threads: int) -> None:
    keys, values = randn(heads[1], 777, head_dim, seed=1), randn(heads[1], 777, head_dim, seed=2)
    check(randn(heads[0], 45, head_dim), keys, values, head_dim**-0.5)


@pytest.mark.parametrize(
    "cuts", [(1,), (512,), (3, 3, 4), (31, 64, 97, 600), (799,), tuple(range(40, 780, 37))], ids=str
)
@pytest.mark.parametrize("window", [None, 90])
def test_parts_are_one_row_of_positions(cuts: tuple[int, ...], window: int | None) -> None:
    keys, values = randn(2, 837, 64, seed=1), randn(2, 837, 64, seed=2)
    check(randn(4, 37, 64), keys, values, 0.125, window=window, cuts=cuts)


@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 100, 511, 512, 1000, 5000])
def test_a_sliding_window_hides_older_positions(window: int, num_threads: int) -> None:
    keys, values = randn(2, 1400, 32, seed=1), randn(2, 1400, 32, seed=2)
    check(randn(4, 301, 32), keys, values, 32**-0.5, window=window)


@pytest.mark.parametrize("window", [None, 9000])
def test_key_ranges_of_a_long_context_are_merged(window: int | None, num_threads: int) -> None:
    keys, values = randn(1, 20011, 64, seed=1), randn(1, 20011, 64, seed=2)
    check(randn(2, 30, 64), keys, values, 0.125, window=window, cuts=(5000, 12345))


@pytest.mark.parametrize("factor", [10.0, 100.0, 1000.0])
def test_sharp_softmax_with_scores_in_the_thousands_and_beyond(factor: float) -> None:
    """Keys that score ever higher raise the reference over and over."""
    keys, values = randn(2, 900, 64, seed=1, factor=factor), randn(2, 900, 64, seed=2)
    order = keys.float().sum(-1).argsort(dim=-1)
    keys = torch.gather(keys, 1, order[..., None].expand_as(keys))
    queries = randn(4, 70, 64).abs()
    out, lse = attend(queries, keys, values, 1.0)
    expected_out, expected_lse = oracle(queries, keys, values, 1.0)
    # Products are summed in float32: a score of 10^5 is good to 10^-2, and so is a weight; few are not 0 or 1.
    is_sharp = (torch.linalg.vector_norm(out - expected_out, dim=-1) > 0.1).float().mean()
    assert is_sharp <= 0.01, f"{is_sharp:.1%} of rows are off"
    torch.testing.assert_close(lse, expected_lse, atol=1e-2, rtol=1e-5)


def test_equal_keys_average_the_values() -> None:
    keys = randn(1, 1, 64, seed=1).expand(2, 1100, 64).contiguous()
    check(randn(4, 200, 64), keys, randn(2, 1100, 64, seed=2), 0.125)


@pytest.mark.parametrize("value", [-0.0, 1e-40, -1e-39])
def test_zeros_and_denormals_are_keys_like_others(value: float) -> None:
    keys = torch.full((2, 600, 64), value).bfloat16()
    check(randn(4, 50, 64), keys, randn(2, 600, 64, seed=2), 0.125)
    check(torch.full((4, 50, 64), value).bfloat16(), randn(2, 600, 64, seed=1), randn(2, 600, 64, seed=2), 0.125)
    out, _ = attend(randn(4, 50, 64), randn(2, 600, 64, seed=1), keys, 0.125)
    torch.testing.assert_close(out, torch.zeros_like(out), atol=1e-37, rtol=0.0)


def test_nan_in_a_key_reaches_those_who_see_it_and_no_one_else() -> None:
    keys, values = randn(2, 300, 64, seed=1), randn(2, 300, 64, seed=2)
    expected, _ = attend(randn(4, 40, 64), keys, values, 0.125)
    keys[0, 280] = torch.nan
    out, _ = attend(randn(4, 40, 64), keys, values, 0.125)
    assert out[:2, 20:].isnan().all()
    torch.testing.assert_close(out[2:], expected[2:], atol=0.0, rtol=0.0)
    torch.testing.assert_close(out[:2, :20], expected[:2, :20], atol=1e-2, rtol=1e-2)


def test_threads_do_not_change_a_bit() -> None:
    keys, values, queries = randn(2, 9001, 64, seed=1), randn(2, 9001, 64, seed=2), randn(4, 70, 64)
    found, before = [], core.num_threads()
    for count in (1, 2, 3):
        core.set_num_threads(count)
        found.append(attend(queries, keys, values, 0.125))
    core.set_num_threads(before)
    for out, lse in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(lse, found[0][1])


def test_chunkings_agree() -> None:
    keys, values, queries = randn(2, 400, 64, seed=1), randn(2, 400, 64, seed=2), randn(4, 400, 64)
    whole, _ = attend(queries, keys, values, 0.125)
    for size in (1, 7, 128, 399):
        pieces = [
            attend(queries[:, b : b + size], keys[:, : b + size], values[:, : b + size], 0.125)[0]
            for b in range(0, 400, size)
        ]
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=TOLERANCE, rtol=TOLERANCE)


def test_bf16_out_is_the_float32_one_rounded() -> None:
    keys, values, queries = randn(2, 9000, 80, seed=1), randn(2, 9000, 80, seed=2), randn(4, 33, 80)
    for num_keys in (200, 9000):  # one range of keys, and several merged
        args = (queries, keys[:, :num_keys], values[:, :num_keys], 0.1)
        assert torch.equal(attend(*args, dtype=torch.bfloat16)[0], attend(*args)[0].bfloat16())


def test_strided_queries_and_outputs_are_taken_as_they_are() -> None:
    keys, values = randn(2, 150, 64, seed=1), randn(2, 150, 64, seed=2)
    packed = randn(50, 4, 64)
    queries, out = packed.transpose(0, 1), torch.empty(50, 4, 64).transpose(0, 1)
    core.attend_chunk(queries, [core.Part(keys, values, 0, 150)], 50, 0.125, out)
    assert torch.equal(out, attend(queries.contiguous(), keys, values, 0.125)[0])


@pytest.mark.parametrize("window", [None, 12])
def test_the_context_path_agrees_with_its_torch_twin(make_world: Any, make_geometry: Any, window: int | None) -> None:
    world = make_world(make_geometry(dtype=torch.bfloat16))
    context = world.context([20, 16], [11, 16], num_tail=5)
    queries = world.randn(4, 6, 16)
    world.extend(context.tail, 6, commit=False)
    found = torch.empty(queries.shape)
    attend_chunk_native(core, queries, context, 1, world.scale, window, found)
    torch.testing.assert_close(
        found, attend_chunk_torch(queries, context, 1, world.scale, window), atol=TOLERANCE, rtol=TOLERANCE
    )


def test_bad_input_is_refused_by_name() -> None:
    keys = randn(2, 64, 64)
    part, queries, out = core.Part(keys, keys, 0, 64), randn(4, 8, 64), torch.empty(4, 8, 64)
    good: dict[str, Any] = {"queries": queries, "parts": [part], "num_new": 8, "scale": 1.0, "out": out}
    bad: dict[str, list[Any]] = {
        "queries": [queries.float(), queries[0], queries[:, :, :32], queries[:3], queries[:, :7]],
        "parts": [[], [core.Part(keys.float(), keys.float(), 0, 64)], [core.Part(keys, keys, 0, 7)], [None]],
        "num_new": [0, 7, -1],
        "scale": [0.0, float("nan")],
        "out": [out.half(), out[:, :7], out[:2]],
        "lse": [torch.empty(4, 7), torch.empty(4)],
        "sliding_window": [0, -3],
    }
    for name, values in bad.items():
        for value in values:
            with pytest.raises((ValueError, TypeError)):
                core.attend_chunk(**{**good, name: value})
