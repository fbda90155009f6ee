"""One contract for all attention methods: decoding equals plain attention over the positions the method selects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from retrieval.context import Context, StaticSet
from retrieval.methods import METHODS, AttentionMethod, make_method
from retrieval.methods.retrieval import RetrievalAttention
from retrieval.methods.snapkv import SnapKvAttention
from retrieval.prefill import attend_chunk

STATIC = StaticSet(num_sink_tokens=5, window_size=12, seal_tokens=16)
NUM_RETRIEVED = 9
NUM_PROMPT = 90
TOLERANCE = 1e-5  # float32 sums in another order


@dataclass
class Decoding:
    """A context just before one decode step of which the new token's K and V are written."""

    context: Context
    prompt_queries: Tensor  # [num_layers, num_q_heads, NUM_PROMPT, d]
    queries: Tensor  # [num_q_heads, d] of the new token


def prefilled(world: Any, method: AttentionMethod, num_generated: int = 0, is_sealed: bool = True) -> Decoding:
    """A prompt through the method's hooks in three chunks, sealed and indexed, and `num_generated` tokens after it."""
    context = world.context()
    prompt_queries = 2 * world.randn(2, 4, NUM_PROMPT, 16)
    for begin, end in ((0, 40), (40, 70), (70, NUM_PROMPT)):
        world.extend(context.tail, end - begin, commit=False)
        for layer_idx in range(2):
            method.observe(context, layer_idx, prompt_queries[layer_idx, :, begin:end])
        context.tail.commit(end - begin)
    method.prefill_done(context, world.scale)
    if is_sealed:
        world.index(context.seal(world.tokens(NUM_PROMPT)))
    if num_generated:
        world.extend(context.tail, num_generated)
    world.extend(context.tail, 1, commit=False)
    return Decoding(context, prompt_queries, 2 * world.randn(4, 16))


def selected(name: str, world: Any, decoding: Decoding, layer_idx: int) -> Tensor:
    """bool `[num_q_heads, num_tokens + 1]`: what the method's paper says each head may see, computed plainly."""
    keys, _ = world.all_kv(decoding.context, layer_idx, 1)
    length = keys.shape[1]
    mask = torch.ones(4, length, dtype=torch.bool)
    if name == "streaming":
        mask[:, STATIC.num_sink_tokens : length - STATIC.window_size] = False
    if name == "retrieval":
        begin, end = STATIC.num_sink_tokens, min(length - STATIC.window_size, NUM_PROMPT)
        scores = torch.einsum("hd,hmd->hm", decoding.queries, keys[:, begin:end].repeat_interleave(2, 0))
        mask[:, begin:end] = False
        mask.scatter_(1, begin + scores.topk(NUM_RETRIEVED, dim=1).indices, True)
    if name == "snapkv":
        first_seen = NUM_PROMPT - STATIC.window_size
        last = decoding.prompt_queries[layer_idx, :, -32:].double()
        scores = last @ keys[:, :first_seen].double().repeat_interleave(2, 0).transpose(1, 2) * world.scale
        votes = torch.softmax(scores, -1).sum(1).reshape(2, 2, -1).sum(1)  # [num_kv_heads, first_seen]
        pooled = functional.max_pool1d(votes[None], 7, stride=1, padding=3)[0]
        mask[:, :first_seen] = False
        mask.scatter_(1, pooled.topk(NUM_RETRIEVED).indices.repeat_interleave(2, 0), True)
    return mask


@pytest.mark.parametrize("num_generated", [0, 3, 40])
@pytest.mark.parametrize("name", METHODS)
def test_decoding_equals_plain_attention_over_what_the_method_selects(
    make_world: Any, oracle: Any, decode: Any, name: str, num_generated: int
) -> None:
    world = make_world(static=STATIC)
    method = make_method(name, num_retrieved=NUM_RETRIEVED)
    decoding = prefilled(world, method, num_generated)
    runs = method.select(decoding.context)
    for layer_idx in range(2):
        out = decode(decoding.queries, decoding.context, runs, layer_idx, NUM_RETRIEVED)
        mask = selected(name, world, decoding, layer_idx)
        keys, values = world.all_kv(decoding.context, layer_idx, 1)
        expected = oracle(decoding.queries[:, None], keys, values, world.scale, mask[:, None])[:, 0]
        torch.testing.assert_close(out, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", METHODS)
def test_a_prompt_shorter_than_what_is_kept_is_seen_whole(make_world: Any, oracle: Any, decode: Any, name: str) -> None:
    world = make_world(static=StaticSet(num_sink_tokens=50, window_size=60, seal_tokens=16))
    method = make_method(name, num_retrieved=NUM_PROMPT)
    decoding = prefilled(world, method)
    out = decode(decoding.queries, decoding.context, method.select(decoding.context), 0, NUM_PROMPT)
    expected = oracle(decoding.queries[:, None], *world.all_kv(decoding.context, 0, 1), world.scale)[:, 0]
    torch.testing.assert_close(out, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_saw_no_prefill_still_decodes(make_world: Any, decode: Any, name: str) -> None:
    world = make_world(static=STATIC)
    context = world.context([30], num_tail=3)  # everything was cached but the last token
    world.extend(context.tail, 1, commit=False)
    runs = make_method(name, num_retrieved=4).select(context)
    out = decode(world.randn(4, 16), context, runs, 0, 4)
    assert torch.isfinite(out).all()
    assert runs[-1].end == 4, "the new token sees itself"


def test_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'flash'.*retrieval, full, streaming, snapkv"):
        make_method("flash", num_retrieved=1)


@pytest.mark.parametrize("lengths", [[2, 40], [3, 1, 40], [60], [4, 60]], ids=str)
def test_streaming_sees_exactly_sink_and_window_over_any_segments(make_world: Any, lengths: list[int]) -> None:
    world = make_world(static=STATIC)
    context = world.context(lengths, num_tail=2)
    world.extend(context.tail, 1, commit=False)
    runs = make_method("streaming", num_retrieved=0).select(context)
    seen = torch.cat([r.kv.keys[0, 0, r.begin : r.end] for r in runs])
    keys, _ = world.all_kv(context, 0, 1)
    assert torch.equal(seen, torch.cat([keys[0, :5], keys[0, -12:]]))


def test_streaming_sees_everything_while_sink_and_window_touch(make_world: Any) -> None:
    world = make_world(static=STATIC)
    for num_tail in (1, 15, 16, 17):
        context = world.context(num_tail=num_tail)
        world.extend(context.tail, 1, commit=False)
        runs = make_method("streaming", num_retrieved=0).select(context)
        assert sum(r.end - r.begin for r in runs) == min(num_tail + 1, 17)


def test_snapkv_keeps_the_planted_heavy_hitters(make_world: Any) -> None:
    world = make_world(static=STATIC)
    planted = [7, 23, 55]
    context = world.context(num_tail=NUM_PROMPT)
    direction = torch.zeros(16)
    direction[0] = 12.0
    for i, position in enumerate(planted):
        context.tail.keys[:, :, position] = direction * (1 + 0.01 * i)
    method = SnapKvAttention(num_kept=30)
    for layer_idx in range(2):
        method.observe(context, layer_idx, world.randn(4, NUM_PROMPT, 16) + direction)
    method.prefill_done(context, world.scale)
    kept = context.method_state.kept
    for layer_idx in range(2):
        for kv_head in range(2):
            whole = context.tail.keys[layer_idx, kv_head]
            where = torch.cdist(kept.keys[layer_idx, kv_head, :30], whole).argmin(1).tolist()
            neighbours = {p + offset for p in planted for offset in range(-3, 4)}
            assert neighbours <= set(where), "pooling keeps a hit's neighbours"


def test_snapkv_votes_with_the_newest_queries_only(make_world: Any) -> None:
    world = make_world(static=STATIC)
    context = world.context(num_tail=NUM_PROMPT)
    method = SnapKvAttention(num_kept=8, num_observed=4)
    queries = world.randn(4, 30, 16)
    for begin, end in ((0, 20), (20, 29), (29, 30)):
        method.observe(context, 0, queries[:, begin:end])
    assert torch.equal(context.method_state.queries[0], queries[:, -4:])


def test_snapkv_forgets_nothing_of_the_store(make_world: Any) -> None:
    world = make_world(static=STATIC)
    decoding = prefilled(world, SnapKvAttention(num_kept=9))
    assert decoding.context.path[0].segment.num_tokens == NUM_PROMPT


@pytest.mark.parametrize("chunks", [[90], [1] * 90, [40, 30, 20], [7] * 12 + [6]], ids=str)
def test_retrieval_samples_the_same_queries_whatever_the_chunks(make_world: Any, chunks: list[int]) -> None:
    world = make_world(static=STATIC)
    method = RetrievalAttention(num_index_queries=36)  # a stride of 5 positions for the group of two heads
    context = world.context()
    context.tail.reserve(NUM_PROMPT)
    context.num_expected_tokens = NUM_PROMPT
    stride = NUM_PROMPT * 2 // 36
    queries = world.randn(4, NUM_PROMPT, 16)
    begin = 0
    for size in chunks:
        method.observe(context, 1, queries[:, begin : begin + size])
        world.extend(context.tail, size)
        begin += size
    expected = queries[:, ::stride]
    for kv_head in range(2):
        sample = context.query_sample.queries(1, kv_head, 16)
        group = expected[2 * kv_head : 2 * kv_head + 2].reshape(-1, 16)
        assert sorted(map(tuple, sample.tolist())) == sorted(map(tuple, group.tolist()))
        assert context.query_sample.queries(0, kv_head, 16).shape == (0, 16)


def test_retrieval_samples_no_queries_for_an_index_that_needs_none(make_world: Any) -> None:
    world = make_world(static=STATIC)
    context = world.context()
    RetrievalAttention(0).observe(context, 0, world.randn(4, 10, 16))
    assert context.query_sample is None


@pytest.mark.parametrize("name", METHODS)
def test_prefill_is_exact_under_every_method(make_world: Any, oracle: Any, name: str) -> None:
    world = make_world(static=STATIC)
    method = make_method(name, num_retrieved=NUM_RETRIEVED)
    context = prefilled(world, method).context
    context.tail.commit(1)
    world.extend(context.tail, 10, commit=False)
    queries = world.randn(4, 10, 16)
    method.observe(context, 0, queries)
    out = attend_chunk(queries, context, 0, world.scale)
    length = context.num_tokens + 10
    mask = torch.ones(length, length, dtype=torch.bool).tril()[-10:]
    expected = oracle(queries, *world.all_kv(context, 0, 10), world.scale, mask)
    torch.testing.assert_close(out, expected, atol=TOLERANCE, rtol=TOLERANCE)
