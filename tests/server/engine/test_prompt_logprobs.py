"""Log-probabilities of prompts against transformers' own forward, whatever the chunks, the cache and the batch."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from server.engine.events import Failure, Progress, PromptLogprobs, Token


def expected_logprobs(folder, prompt) -> torch.Tensor:
    """float32 `[len(prompt) - 1, vocab_size]`: row i scores token i + 1."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([prompt])).logits[0, :-1].float(), dim=-1)


def joined(events) -> PromptLogprobs:
    """All scores of one prompt, which have to follow each other without a gap."""
    parts = [e for e in events if isinstance(e, PromptLogprobs)]
    ends = [part.start + len(part.ranks) for part in parts]
    assert [part.start for part in parts] == [1, *ends[:-1]]
    return PromptLogprobs(
        1,
        np.concatenate([part.token_ids for part in parts]),
        np.concatenate([part.logprobs for part in parts]),
        np.concatenate([part.ranks for part in parts]),
    )


@pytest.mark.parametrize("family", ["llama", "phi3"])  # the fused forward, and transformers' own
@pytest.mark.parametrize("num_tokens", [2, 96, 97, 250])  # chunks have at most 96
async def test_scores_are_those_of_transformers(family, num_tokens, tiny_model, make_engine, prompt, run):
    ids = prompt(num_tokens)
    scores = joined(await run(make_engine(family), ids, max_tokens=2, num_prompt_logprobs=3))
    expected = expected_logprobs(tiny_model(family), ids)
    best, _ = expected.topk(3, dim=-1)
    own = expected.gather(1, torch.tensor(ids[1:])[:, None])
    np.testing.assert_array_equal(scores.token_ids[:, 0], ids[1:])
    np.testing.assert_allclose(scores.logprobs, torch.cat((own, best), dim=1), atol=1e-3)  # order of summation
    listed = expected.gather(1, torch.from_numpy(scores.token_ids[:, 1:].astype(np.int64)))
    np.testing.assert_allclose(listed, best, atol=1e-3)
    assert (np.abs(scores.ranks - ((expected > own).sum(-1) + 1).numpy()) <= 1).all()  # near ties may swap


async def test_one_token_has_no_score(make_engine, prompt, run):
    events = await run(make_engine(), prompt(1), max_tokens=1, num_prompt_logprobs=1)
    assert not any(isinstance(e, PromptLogprobs) for e in events)


async def test_only_the_tokens_own_score_when_no_alternatives_are_asked_for(make_engine, prompt, run):
    assert joined(await run(make_engine(), prompt(20), num_prompt_logprobs=0)).logprobs.shape == (19, 1)


async def test_cached_prefix_is_read_again(make_engine, prompt, run, tokens_of):
    engine = make_engine()
    plain = await run(engine, prompt(300))
    first = await run(engine, prompt(300), num_prompt_logprobs=2)
    second = await run(engine, prompt(300), num_prompt_logprobs=2)
    assert tokens_of(plain) == tokens_of(first) == tokens_of(second)
    assert [e[-1].usage.num_cached_tokens for e in (first, second)] == [0, 0]
    np.testing.assert_allclose(joined(first).logprobs, joined(second).logprobs, atol=1e-5)
    assert (await run(engine, prompt(300)))[-1].usage.num_cached_tokens > 200


async def test_scores_come_before_the_first_token_and_once_for_all_choices(make_engine, prompt, run):
    events = await run(make_engine(), prompt(200), n=3, num_prompt_logprobs=1)
    last = max(i for i, e in enumerate(events) if isinstance(e, Progress | PromptLogprobs))
    assert last < min(i for i, e in enumerate(events) if isinstance(e, Token))
    assert len(joined(events).ranks) == 199


async def test_others_in_the_batch_change_nothing(make_engine, prompt, run):
    engine = make_engine()
    wanted = joined(await run(engine, prompt(150), num_prompt_logprobs=2))
    noise = [run(engine, prompt(30 + 50 * i, seed=5), num_prompt_logprobs=i or None) for i in range(4)]
    events, *others = await asyncio.gather(run(engine, prompt(150), num_prompt_logprobs=2), *noise)
    np.testing.assert_allclose(joined(events).logprobs, wanted.logprobs, atol=1e-4)
    for i, answer in enumerate(others):
        num_scores = sum(len(e.ranks) for e in answer if isinstance(e, PromptLogprobs))
        assert num_scores == (29 + 50 * i if i else 0)


async def test_prompt_with_a_non_finite_score_fails_alone(make_engine, prompt, run, monkeypatch):
    engine = make_engine()
    plain = engine._runner.run

    def spoilt(work):
        result = plain(work)
        if any(w.num_logits > 1 for w in work):
            result.logits[3, 5] = float("nan")
        return result

    monkeypatch.setattr(engine._runner, "run", spoilt)
    events = await run(engine, prompt(60), num_prompt_logprobs=1)
    assert isinstance(events[-1], Failure)
    assert not isinstance((await run(engine, prompt(60)))[-1], Failure)
