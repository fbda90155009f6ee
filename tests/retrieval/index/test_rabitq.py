"""What `rabitq` promises beyond the contract: needles nobody looked for, any number of bits, small bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from retrieval.index import IndexInputError, build, kind_class

pytest.importorskip("retrieval._core", reason="needs the C++ core")

NUM_KEYS, HEAD_DIM = 20_000, 64


def keys_and_needles(num_needles: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Keys with a large shared mean, queries from elsewhere, each pointing at one key; and which."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(NUM_KEYS, HEAD_DIM, generator=generator) * torch.linspace(2.0, 0.3, HEAD_DIM)
    keys = (noise + 3.0 * torch.randn(HEAD_DIM, generator=generator)).bfloat16()
    where = torch.randint(0, NUM_KEYS, (num_needles,), generator=generator)
    queries = noise[where] * 3.0 + torch.randn(num_needles, HEAD_DIM, generator=generator)
    return keys, queries.bfloat16(), where


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_every_needle_is_found_with_any_number_of_bits(bits: int) -> None:
    keys, queries, _ = keys_and_needles(200)
    found, _ = build("rabitq", keys, queries[:0], bits=bits).search(queries, 1)
    expected, _ = build("flat", keys, queries[:0]).search(queries, 1)
    assert (found == expected).float().mean() >= 0.995


def test_few_keys_are_scored_and_few_bytes_held() -> None:
    keys, queries, _ = keys_and_needles(50)
    index = build("rabitq", keys, queries[:0])
    index.search(queries[:1], 10)
    assert index.count_scored(1, 10, NUM_KEYS) < 0.1 * NUM_KEYS
    assert index.nbytes < 0.2 * 2 * keys.numel() * keys.element_size()


def test_more_deviations_score_more_keys() -> None:
    keys, queries, _ = keys_and_needles(1)
    scored = []
    for deviations in (1.0, 3.0, 5.0):
        index = build("rabitq", keys, queries[:0], deviations=deviations)
        index.search(queries, 10)
        scored.append(index.count_scored(1, 10, NUM_KEYS))
    assert scored == sorted(scored)
    assert scored[0] < scored[-1]


def test_the_rotation_follows_the_seed() -> None:
    keys, queries, _ = keys_and_needles(20)
    first, again = (build("rabitq", keys, queries[:0], seed=7).search(queries, 50) for _ in range(2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)


def test_options_out_of_range_are_refused() -> None:
    keys, queries, _ = keys_and_needles(1)
    for options in ({"bits": 0}, {"bits": 5}):
        with pytest.raises(ValueError, match="bits"):
            build("rabitq", keys, queries, **options)
    with pytest.raises(IndexInputError):
        kind_class("rabitq")(keys, queries).attend(queries, keys[:10], 5, 0.1)
