"""The engine against transformers' own generate, against full attention, and batches against one by one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from server.engine.events import Token

DEMO = Path("server/demo_model")


def generate(folder: Path, prompt: tuple[int, ...], num_tokens: int, dtype: torch.dtype = torch.float32) -> list[int]:
    """Greedy tokens of plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("attention", "index"), [("full", "flat"), ("retrieval", "flat"), ("retrieval", "rabitq")])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
async def test_greedy_tokens_equal_transformers_generate(
    family, attention, index, tiny_model, make_engine, prompt, run, tokens_of
):
    engine = make_engine(family, attention=attention, index=index, num_retrieved=4096)
    for num_tokens in (1, 17, 300):
        ids = prompt(num_tokens)
        assert tokens_of(await run(engine, ids, max_tokens=24)) == generate(tiny_model(family), ids, 24), num_tokens


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "phi3"])
async def test_fused_and_eager_forwards_agree(family, make_engine, prompt, run, tokens_of):
    """Phi-3 has fused weights of its own kind: it runs through transformers in both."""
    fused, eager = make_engine(family), make_engine(family, enforce_eager=True)
    assert (fused._runner._fused is None) == (family == "phi3")
    assert eager._runner._fused is None
    ids = prompt(200, seed=2)
    events = [await run(engine, ids, max_tokens=12, num_logprobs=0) for engine in (fused, eager)]
    assert tokens_of(events[0]) == tokens_of(events[1])
    logprobs = [[e.logprob.logprob for e in es if isinstance(e, Token)] for es in events]
    torch.testing.assert_close(torch.tensor(logprobs[0]), torch.tensor(logprobs[1]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("attention", ["full", "retrieval"])
async def test_bundled_model_equals_transformers_generate(attention, make_engine, prompt, run, tokens_of):
    engine = make_engine(model=str(DEMO), attention=attention, num_retrieved=4096, dtype="float32")
    ids = prompt(400, seed=3)
    assert tokens_of(await run(engine, ids, max_tokens=24)) == generate(DEMO, ids, 24)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1)])
async def test_retrieving_everything_gives_the_logprobs_of_full_attention(dtype, tolerance, make_engine, prompt, run):
    """Top log-probabilities of the first decoded token; tolerance in nats: float32 order of summation, and the
    rounding of bf16 softmax weights and activations."""
    ids = prompt(600, seed=1)
    steps = {}
    for attention in ("full", "retrieval"):
        engine = make_engine(model=str(DEMO), attention=attention, num_retrieved=4096, dtype=dtype)
        await run(engine, ids, max_tokens=1)
        engine._manager.wait_for_indexes()
        events = await run(engine, ids, max_tokens=2, num_logprobs=20)
        steps[attention] = [e for e in events if isinstance(e, Token)]
    full, found = steps["full"], steps["retrieval"]
    assert found[0].token_id == full[0].token_id
    expected = {t.token_id: t.logprob for t in full[1].top_logprobs}
    shared = [t for t in found[1].top_logprobs if t.token_id in expected]
    assert len(shared) >= 18
    torch.testing.assert_close(
        torch.tensor([t.logprob for t in shared]),
        torch.tensor([expected[t.token_id] for t in shared]),
        atol=tolerance,
        rtol=0,
    )


async def test_indexed_decode_after_reuse_equals_a_cold_run(make_engine, prompt, run, tokens_of):
    """A prefix that ends inside a shared segment is read through its index with a position limit."""
    first, other = prompt(300), prompt(40, seed=9)
    cold = make_engine(attention="full", prefix_caching=False)
    warm = make_engine(num_retrieved=4096)
    await run(warm, first)
    warm._manager.wait_for_indexes()
    for cut in (300, 250, 130, 64, 10):
        ids = first[:cut] + other
        events = await run(warm, ids)
        assert events[-1].usage.num_cached_tokens >= cut
        assert tokens_of(events) == tokens_of(await run(cold, ids)), cut


async def test_long_generation_is_sealed_and_stays_exact(make_engine, prompt, run, tokens_of):
    engine, oracle = make_engine(num_retrieved=4096), make_engine(attention="full", prefix_caching=False)
    ids = prompt(50)
    events = await run(engine, ids, max_tokens=300)
    assert len(engine._manager.store) > 1
    assert tokens_of(events) == tokens_of(await run(oracle, ids, max_tokens=300))


async def test_packed_batch_of_mixed_sequences_equals_one_by_one(make_engine, prompt, run, tokens_of):
    prompts = [prompt(n, seed=5) for n in (1, 3, 40, 97, 150, 250, 400, 33)]
    sampling = [{"temperature": 0.0} if i % 2 else {"temperature": 1.0, "seed": i} for i in range(8)]
    engine = make_engine(prefix_caching=False, num_retrieved=4096)
    alone = [tokens_of(await run(engine, p, **s)) for p, s in zip(prompts, sampling, strict=True)]
    packed = await asyncio.gather(*[run(engine, p, **s) for p, s in zip(prompts, sampling, strict=True)])
    assert [tokens_of(events) for events in packed] == alone


@pytest.mark.parametrize("index", ["flat", "rabitq"])
async def test_int8_cache_decodes_as_full_attention_over_the_same_int8_cache(
    index, make_engine, prompt, run, tokens_of
):
    ids = prompt(300, seed=4)
    oracle = make_engine(attention="full", kv_cache_dtype="int8")
    expected = tokens_of(await run(oracle, ids, max_tokens=40))
    engine = make_engine(index=index, kv_cache_dtype="int8", num_retrieved=4096)
    for _ in range(2):
        assert tokens_of(await run(engine, ids, max_tokens=40)) == expected
        engine._manager.wait_for_indexes()
