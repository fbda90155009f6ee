"""Choosing tokens: each filter by hand, distributions by chi-square, random streams of their own."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from server.engine.request import SamplingParams
from server.engine.sampler import (
    NonFiniteLogitsError,
    Row,
    Sampled,
    SamplerState,
    make_state,
    penalise,
    sample,
    sample_rows,
)

VOCAB = 8
LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0, 0.5, -2.0, 1.5, -0.5])  # by rank: 1 6 2 4 0 7 3 5
NO_IDS = frozenset[int]()
CHI_SQUARE_999 = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 6: 22.46, 7: 24.32}  # 99.9 % quantiles by degrees of freedom


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors here are tiny: a second thread only makes them wait, worst on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(logits: Tensor = LOGITS, seed: int = 0, prompt: tuple[int, ...] = (), **params: Any) -> int:
    """One token of a fresh state."""
    settings = SamplingParams(**params)
    state = make_state(settings, prompt, 0, seed, len(logits))
    return sample(logits, settings, state, 0, NO_IDS).token_id


def draws(count: int, logits: Tensor = LOGITS, seed: int = 1, **params: Any) -> Counter[int]:
    """`count` tokens of one stream (without penalties each is drawn alike)."""
    settings = SamplingParams(**params)
    state = make_state(settings, (), 0, seed, len(logits))
    return Counter(sample(logits, settings, state, i, NO_IDS).token_id for i in range(count))


def check_distribution(counts: Counter[int], expected: dict[int, float]) -> None:
    """Chi-square at 99.9 %, with a fixed seed: fails for a wrong distribution, never by bad luck."""
    total = counts.total()
    assert set(counts) <= set(expected)
    statistic = sum((counts[t] - total * p) ** 2 / (total * p) for t, p in expected.items())
    assert statistic < CHI_SQUARE_999[len(expected) - 1]


def softmax(logits: Tensor, temperature: float = 1.0) -> dict[int, float]:
    return dict(enumerate(torch.softmax(logits.double() / temperature, 0).tolist()))


def renormalised(kept: list[int], probabilities: dict[int, float]) -> dict[int, float]:
    total = sum(probabilities[t] for t in kept)
    return {t: probabilities[t] / total for t in kept}


def test_temperature_zero_takes_the_best_token() -> None:
    assert [draw(seed=seed, temperature=0.0) for seed in range(20)] == [1] * 20


def test_greedy_takes_the_first_of_equals() -> None:
    assert draw(torch.tensor([1.0, 3.0, 3.0, 0.0]), temperature=0.0) == 1


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-46, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    assert draws(20, temperature=temperature) == {1: 20}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_follow_the_tempered_softmax(temperature: float) -> None:
    check_distribution(draws(4000, temperature=temperature), softmax(LOGITS, temperature))


def test_a_wrong_distribution_is_noticed() -> None:
    with pytest.raises(AssertionError):
        check_distribution(draws(4000, temperature=1.2), softmax(LOGITS, 1.0))


def test_top_k_leaves_the_k_best() -> None:
    check_distribution(draws(2000, top_k=3), renormalised([1, 6, 2], softmax(LOGITS)))
    assert draws(50, top_k=1) == {1: 50}
    for off in (0, -1, VOCAB, 100):
        check_distribution(draws(1500, top_k=off), softmax(LOGITS))


def test_top_p_leaves_the_smallest_set_that_reaches_p() -> None:
    probabilities = softmax(LOGITS)
    first, second, third = probabilities[1], probabilities[6], probabilities[2]
    assert draws(50, top_p=first - 1e-4) == {1: 50}
    check_distribution(draws(2000, top_p=first + 1e-4), renormalised([1, 6], probabilities))
    check_distribution(draws(2000, top_p=first + second + third - 1e-4), renormalised([1, 6, 2], probabilities))
    assert draws(50, top_p=0.0) == {1: 50}


def test_min_p_is_relative_to_the_best() -> None:
    probabilities = softmax(LOGITS)
    between = (math.exp(1.0 - 2.0) + math.exp(0.5 - 2.0)) / 2  # tokens 1, 6 and 2 are above
    check_distribution(draws(2000, min_p=between), renormalised([1, 6, 2], probabilities))
    assert draws(50, min_p=1.0) == {1: 50}


def test_filters_see_the_tempered_distribution() -> None:
    hot = softmax(LOGITS, 2.0)
    check_distribution(draws(2000, temperature=2.0, top_p=hot[1] + 1e-4), renormalised([1, 6], hot))
    between = (math.exp((1.0 - 2.0) / 2) + math.exp((0.5 - 2.0) / 2)) / 2
    check_distribution(draws(2000, temperature=2.0, min_p=between), renormalised([1, 6, 2], hot))


def test_top_p_counts_what_top_k_left() -> None:
    left = renormalised([1, 6, 2], softmax(LOGITS))
    check_distribution(draws(2000, top_k=3, top_p=left[1] + 1e-4), renormalised([1, 6], left))


def state_after(tokens: list[int], params: SamplingParams, prompt: tuple[int, ...] = ()) -> SamplerState:
    """A state in which `tokens` were generated."""
    state = make_state(params, prompt, 0, 0, VOCAB)
    for i, token in enumerate(tokens):
        forced = torch.full((VOCAB,), -1e9)
        forced[token] = 1e9
        assert sample(forced, params, state, i, NO_IDS).token_id == token
    return state


def penalised(tokens: list[int], prompt: tuple[int, ...] = (), **options: Any) -> dict[int, float]:
    """Logits after penalties, on the scale of token 5's, which no test penalises."""
    params = SamplingParams(temperature=0.0, **options)
    logits = penalise(LOGITS, params, state_after(tokens, params, prompt))
    return dict(enumerate((logits - logits[5] + LOGITS[5]).tolist()))


def expect(found: dict[int, float], changed: dict[int, float]) -> None:
    expected = {i: float(v) for i, v in enumerate(LOGITS)} | changed
    assert found == pytest.approx(expected, abs=1e-5)


def test_presence_penalty_counts_once() -> None:
    expect(penalised([1, 1, 3], prompt=(6,), presence_penalty=0.5), {1: 1.5, 3: -1.5})


def test_frequency_penalty_counts_every_time() -> None:
    expect(penalised([1, 1, 3], prompt=(6,), frequency_penalty=0.5), {1: 1.0, 3: -1.5})


def test_negative_penalties_encourage() -> None:
    expect(penalised([1, 1, 3], presence_penalty=-1.0, frequency_penalty=-0.25), {1: 3.5, 3: 0.25})


def test_repetition_penalty_shrinks_what_prompt_and_answer_hold() -> None:
    expect(penalised([1, 1], prompt=(6, 3, 3), repetition_penalty=2.0), {1: 1.0, 6: 0.75, 3: -2.0})


def test_all_penalties_together() -> None:
    changed = {1: 2.0 / 2 - 2 * 0.25 - 0.5, 3: -1.0 * 2 - 0.25 - 0.5, 6: 1.5 / 2}
    options = {"repetition_penalty": 2.0, "frequency_penalty": 0.25, "presence_penalty": 0.5}
    expect(penalised([1, 1, 3], prompt=(6,), **options), changed)


def test_penalties_change_the_choice() -> None:
    params = SamplingParams(temperature=0.0, frequency_penalty=0.3)
    state = make_state(params, (), 0, 0, VOCAB)
    assert [sample(LOGITS, params, state, i, NO_IDS).token_id for i in range(7)] == [1, 1, 6, 1, 6, 1, 2]


def test_logit_bias_shifts_and_forbids() -> None:
    assert draw(temperature=0.0, logit_bias=((3, 3.5),)) == 3
    assert draw(temperature=0.0, logit_bias=((1, -100.0), (6, -100.0))) == 2
    counts = draws(4000, logit_bias=((5, 2.0), (1, -100.0)))
    shifted = LOGITS.clone()
    shifted[5], shifted[1] = 0.0, -98.0
    expected = softmax(shifted)
    del expected[1]
    check_distribution(counts, expected)


def test_end_tokens_wait_for_min_tokens() -> None:
    params = SamplingParams(temperature=0.0, min_tokens=3)
    state, end_ids = make_state(params, (), 0, 0, VOCAB), frozenset({1, 6})
    chosen = [sample(LOGITS, params, state, num_generated, end_ids).token_id for num_generated in range(5)]
    assert chosen == [2, 2, 2, 1, 1]


def test_a_bias_cannot_bring_back_a_forbidden_end_token() -> None:
    params = SamplingParams(temperature=0.0, min_tokens=1, logit_bias=((1, 100.0),))
    assert sample(LOGITS, params, make_state(params, (), 0, 0, VOCAB), 0, frozenset({1})).token_id == 6


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_are_of_the_whole_distribution(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, num_logprobs=3, top_k=1)
    sampled = sample(LOGITS, params, make_state(params, (), 0, 0, VOCAB), 0, NO_IDS)
    expected = torch.log_softmax(LOGITS, 0)
    assert [t.token_id for t in sampled.top_logprobs] == [1, 6, 2]
    assert [t.logprob for t in sampled.top_logprobs] == pytest.approx(expected[[1, 6, 2]].tolist(), abs=1e-6)
    assert sampled.logprob is not None
    assert (sampled.logprob.token_id, sampled.logprob.logprob) == (1, pytest.approx(float(expected[1]), abs=1e-6))


def test_the_chosen_token_has_a_logprob_even_outside_the_listed_ones() -> None:
    params = SamplingParams(temperature=100.0, num_logprobs=1)
    state = make_state(params, (), 0, 3, VOCAB)
    sampled = [sample(LOGITS, params, state, i, NO_IDS) for i in range(20)]
    assert {s.top_logprobs[0].token_id for s in sampled} == {1}
    assert len({s.token_id for s in sampled}) > 3
    for s in sampled:
        assert s.logprob is not None
        assert s.logprob.logprob == pytest.approx(float(torch.log_softmax(LOGITS, 0)[s.token_id]), abs=1e-6)


def test_logprobs_are_the_models_own_whatever_is_biased_or_penalised() -> None:
    params = SamplingParams(temperature=0.0, num_logprobs=2, logit_bias=((3, 100.0),), presence_penalty=1.0)
    sampled = sample(LOGITS, params, state_after([1], params), 1, NO_IDS)
    assert sampled.token_id == 3
    assert sampled.logprob is not None
    assert sampled.logprob.logprob == pytest.approx(float(torch.log_softmax(LOGITS, 0)[3]), abs=1e-6)


class OnlyEven:
    """Allows even tokens and remembers what was accepted."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def allowed_tokens(self, vocab_size: int) -> Any:
        return np.arange(vocab_size) % 2 == 0

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)


def test_a_constraint_masks_tokens_and_sees_those_chosen() -> None:
    constraint = OnlyEven()
    params = SamplingParams(temperature=3.0)
    state = make_state(params, (), 0, 0, VOCAB, constraint)
    chosen = [sample(LOGITS, params, state, i, NO_IDS).token_id for i in range(50)]
    assert {token % 2 for token in chosen} == {0}
    assert constraint.accepted == chosen


class Only:
    """Allows some tokens."""

    def __init__(self, *token_ids: int) -> None:
        self.token_ids = list(token_ids)

    def allowed_tokens(self, vocab_size: int) -> Any:
        allowed = np.zeros(vocab_size, dtype=np.bool_)
        allowed[self.token_ids] = True
        return allowed

    def accept(self, token_id: int) -> None: ...


@pytest.mark.parametrize("end_ids", [frozenset({2}), frozenset({2, 4})])
def test_min_tokens_yields_to_a_grammar_that_has_come_to_its_end(end_ids: frozenset[int]) -> None:
    params = SamplingParams(min_tokens=5)
    state = make_state(params, (), 0, 0, VOCAB, Only(*end_ids))
    assert sample(LOGITS, params, state, 0, end_ids).token_id in end_ids


def test_min_tokens_keeps_a_grammar_going_that_may_go_on() -> None:
    params = SamplingParams(min_tokens=5, temperature=9.0, logit_bias=((2, 100.0),))
    state = make_state(params, (), 0, 0, VOCAB, Only(2, 3))
    chosen = [sample(LOGITS, params, state, i, frozenset({2})).token_id for i in range(6)]
    assert chosen == [3] * 5 + [2]


def test_logprobs_only_when_asked_for() -> None:
    for asked, has_chosen in ((None, False), (0, True)):
        params = SamplingParams(num_logprobs=asked)
        sampled = sample(LOGITS, params, make_state(params, (), 0, 0, VOCAB), 0, NO_IDS)
        assert ((sampled.logprob is not None), sampled.top_logprobs) == (has_chosen, ())


def stream(seed: int, choice: int = 0, count: int = 30) -> list[int]:
    params = SamplingParams(temperature=2.0)
    state = make_state(params, (), choice, seed, VOCAB)
    return [sample(LOGITS, params, state, i, NO_IDS).token_id for i in range(count)]


def test_the_same_seed_gives_the_same_tokens() -> None:
    assert stream(7) == stream(7)
    assert stream(7) != stream(8)


def test_choices_of_one_seed_differ_and_are_reproducible() -> None:
    choices = [stream(7, choice) for choice in range(4)]
    assert len({tuple(c) for c in choices}) == 4
    assert choices[2] == stream(7, 2)


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, 2**64])
def test_any_integer_is_a_seed(seed: int) -> None:
    assert stream(seed, choice=3) == stream(seed, choice=3)


def test_other_sequences_and_the_global_generator_change_nothing() -> None:
    alone = stream(7)
    params = SamplingParams(temperature=2.0)
    ours, others = make_state(params, (), 0, 7, VOCAB), [make_state(params, (), 0, s, VOCAB) for s in range(3)]
    mixed = []
    for i in range(30):
        torch.manual_seed(i)
        torch.rand(i)
        for other in others[: i % 4]:
            sample(LOGITS, params, other, i, NO_IDS)
        mixed.append(sample(LOGITS, params, ours, i, NO_IDS).token_id)
    assert mixed == alone


def test_logits_are_left_as_they_were() -> None:
    logits = LOGITS.clone()
    params = SamplingParams(
        min_tokens=1, logit_bias=((0, 5.0),), repetition_penalty=2.0, presence_penalty=1.0, num_logprobs=2
    )
    sample(logits, params, make_state(params, (0, 1), 0, 0, VOCAB), 0, frozenset({1}))
    assert torch.equal(logits, LOGITS)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(bad: float, temperature: float) -> None:
    logits = LOGITS.clone()
    logits[3] = bad
    with pytest.raises(NonFiniteLogitsError):
        draw(logits, temperature=temperature)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_without_any_choice_are_refused(temperature: float) -> None:
    with pytest.raises(NonFiniteLogitsError):
        draw(torch.full((VOCAB,), -math.inf), temperature=temperature)
    only_end = torch.full((VOCAB,), -math.inf)
    only_end[1] = 0.0
    params = SamplingParams(temperature=temperature, min_tokens=1)
    with pytest.raises(NonFiniteLogitsError):
        sample(only_end, params, make_state(params, (), 0, 0, VOCAB), 0, frozenset({1}))


def test_masked_logits_are_never_drawn() -> None:
    logits = LOGITS.clone()
    logits[[1, 6, 2]] = -math.inf
    counts = draws(2000, logits, temperature=5.0)
    assert not set(counts) & {1, 6, 2}
    check_distribution(counts, renormalised([0, 3, 4, 5, 7], softmax(logits, 5.0)))


def test_a_large_vocabulary_keeps_its_tail() -> None:
    logits = torch.zeros(50_000)
    tokens = [draw(logits, seed=seed) for seed in range(40)]
    assert sum(t >= 25_000 for t in tokens) == pytest.approx(20, abs=10)
    assert len(set(tokens)) > 35


MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.3, "num_logprobs": 3},
    {"temperature": 1.7, "top_p": 0.8},
    {"temperature": 0.0, "top_k": 1},
    {"temperature": 1.0, "presence_penalty": 0.5},
    {"temperature": 0.0, "logit_bias": ((3, 5.0),)},
    {"temperature": 0.9, "min_tokens": 2},
]


@pytest.mark.parametrize("vocab_size", [8, 4099])
def test_rows_together_are_rows_one_by_one(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(3)
    params = [SamplingParams(**fields) for fields in MIXED]
    alone = [make_state(p, (), 0, 5 + i, vocab_size) for i, p in enumerate(params)]
    together = [make_state(p, (), 0, 5 + i, vocab_size) for i, p in enumerate(params)]
    for step in range(40):
        logits = torch.randn(len(params), vocab_size, generator=generator).round(decimals=1)  # with equals among them
        ends = frozenset({step % vocab_size})
        expected = [sample(row, p, s, step, ends) for row, p, s in zip(logits, params, alone, strict=True)]
        rows = [Row(row, p, s, step, ends) for row, p, s in zip(logits, params, together, strict=True)]
        assert sample_rows(rows) == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_fails_alone(bad: float) -> None:
    logits = torch.stack([LOGITS, torch.full_like(LOGITS, bad), LOGITS, torch.full_like(LOGITS, bad)])
    params = [SamplingParams(temperature=t) for t in (0.0, 0.0, 1.0, 1.0)]
    rows = [Row(row, p, make_state(p, (), 0, 1, VOCAB), 0, NO_IDS) for row, p in zip(logits, params, strict=True)]
    kinds = [type(result) for result in sample_rows(rows)]
    assert kinds == [Sampled, NonFiniteLogitsError, Sampled, NonFiniteLogitsError]
    assert sample_rows([]) == []
