"""Merging segments changes what is held, never what is seen, counted or found."""

from __future__ import annotations

import math
import random
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from retrieval import native
from retrieval.builder import IndexBuilder
from retrieval.compaction import SHRINK, Compactor, count_to_merge
from retrieval.context import Context, StaticSet, open_context
from retrieval.geometry import Geometry
from retrieval.kv_buffer import KvBuffer
from retrieval.segment_index import CodesMaker
from retrieval.segments import PathEntry, PathHold, Segment, SegmentStore, common_prefix, segment_digest

CPU = torch.device("cpu")
TINY = Geometry(2, 1, 1, 1, torch.float32, (None, None))
STATIC = StaticSet(num_sink_tokens=2, window_size=3, seal_tokens=4)
TOKEN_BYTES = TINY.kv_bytes_per_token


# --- which segments are merged ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_growing_path_stays_logarithmic_and_so_does_the_copying(seed: int) -> None:
    draw, lengths, copied, total = random.Random(seed), list[int](), 0, 0
    for _ in range(2000):
        lengths.append(draw.randint(2048, 4096))
        total += lengths[-1]
        count = count_to_merge(lengths)
        if count:
            lengths[-count:] = [sum(lengths[-count:])]
            copied += lengths[-1]
        assert all(a >= SHRINK * b for a, b in pairwise(lengths))
        assert len(lengths) <= 1 + math.log2(total / 2048)
    assert sum(lengths) == total
    assert copied <= total * (1 + math.log(total / 2048, 1.5))


def test_a_long_document_is_not_copied_for_a_short_text_before_it() -> None:
    assert count_to_merge([2048, 131072]) == 0
    assert count_to_merge([2048, 131072, 2048]) == 0
    assert count_to_merge([2048, 131072, 70000]) == 2
    assert count_to_merge([131072]) == 0


# --- the same attention -----------------------------------------------------------------------------------


def compactor_of(store: SegmentStore, builder: IndexBuilder | None, min_tokens: int) -> Compactor:
    index_of = builder.merged if builder else None
    return Compactor(store, min_tokens, lambda tokens: tokens, lambda _: None, lambda *_: None, index_of)


def compact(compactor: Compactor) -> None:
    """Until nothing is left to merge."""
    compactor.settle()
    while compactor.num_pending:
        compactor.wait()
        compactor.settle()


@pytest.mark.parametrize("limit", [20, 11])
def test_a_merged_path_gives_the_attention_of_the_unmerged_one(world: Any, decode: Any, limit: int) -> None:
    builder = IndexBuilder("flat", {}, world.static.num_sink_tokens, lambda *_: None)
    context = world.context([20, 20, 20], limits=[20, 20, limit], num_tail=12)
    last = context.path[-1].segment
    for entry in context.path:
        builder.submit(entry.segment, None)
    builder.wait()
    queries = world.randn(4, 16)
    before = decode(queries, context, context.decode_runs(0), 1, 1000)
    compactor = compactor_of(world.store, builder, min_tokens=16)
    compactor.consider(last)
    compact(compactor)
    (entry,) = context.path
    assert (entry.limit, entry.segment.num_tokens, entry.segment.index_state) == (40 + limit, 60, "ready")
    after = decode(queries, context, context.decode_runs(0), 1, 1000)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    compactor.close()
    builder.close()


@pytest.mark.parametrize("is_quantized", [False, True])
def test_codes_are_carried_over_and_find_what_an_exact_search_finds(make_world: Any, is_quantized: bool) -> None:
    core = native.core()
    if core is None:
        pytest.skip("needs the C++ core")
    geometry = Geometry(2, 4, 2, 32, torch.float32, (None, None), is_quantized)
    world = make_world(geometry=geometry, static=StaticSet(4, 8, 16))
    maker = CodesMaker(core, core.Budget())
    builder = IndexBuilder("rabitq", {}, 4, lambda *_: None, maker)
    context = world.context([300, 200, 150])
    for entry in context.path:
        builder.submit(entry.segment, None)
    builder.wait()
    keys = torch.cat([e.segment.kv.read_keys(1, 0, e.limit) for e in context.path], dim=1)
    compactor = compactor_of(world.store, builder, min_tokens=16)
    compactor.consider(context.path[-1].segment)
    compact(compactor)
    (entry,) = context.path
    index = entry.segment.index
    assert [codes.num_keys for codes in index.layers] == [650, 650]
    assert torch.equal(entry.segment.kv.read_keys(1, 0, 650), keys)
    query = world.randn(32)
    found = index.search(1, 1, query, 10, 650)
    exact = (keys[1, index.begin :].float() @ query).topk(10).indices + index.begin
    assert len(set(found.tolist()) & set(exact.tolist())) >= 9
    compactor.close()
    builder.close()


# --- structure ----------------------------------------------------------------------------------------------


@pytest.fixture
def compactor(world: Any) -> Iterator[Compactor]:
    compactor = compactor_of(world.store, None, min_tokens=16)
    yield compactor
    compactor.close()


def test_forks_from_the_inside_keep_their_place(world: Any, compactor: Compactor) -> None:
    context = world.context([20, 16])
    first, second = (e.segment for e in context.path)
    inside_first = world.store.add("", PathEntry(first, 7), world.tokens(5), world.kv(5))
    inside_second = world.store.add("", PathEntry(second, 9), world.tokens(5), world.kv(5))
    digests = inside_first.digest, inside_second.digest
    compactor.consider(second)
    compact(compactor)
    merged = context.path[0].segment
    assert {(c.parent, c.parent_limit, c.start) for c in merged.children} == {(merged, 7, 7), (merged, 29, 29)}
    for child, digest in zip((inside_first, inside_second), digests, strict=True):
        above = PathEntry(merged, child.parent_limit)
        assert segment_digest("", above, child.token_ids) == child.digest == digest
        tokens = np.concatenate([merged.token_ids[: child.start], child.token_ids, [1001]]).astype(np.int32)
        assert world.store.longest_prefix(tokens, "") == (above, PathEntry(child, 5))
    assert merged.num_references == 3


def test_a_fork_of_running_contexts_switches_with_them(world: Any, compactor: Compactor) -> None:
    context = world.context([20, 16, 16], num_tail=3)
    twin, hold = context.fork(), PathHold(world.store, context.path[:2])
    keys = world.all_kv(context, 1)[0].clone()
    compactor.consider(context.path[-1].segment)
    compact(compactor)
    assert len(world.store) == 1
    assert [len(c.path) for c in (context, twin, hold)] == [1, 1, 1]
    assert hold.path[0].limit == 36
    assert torch.equal(world.all_kv(context, 1)[0], keys)
    for held in (context, twin):
        held.close()
    hold.release()
    (merged,) = world.store
    assert merged.num_references == 0


def test_the_same_content_held_as_one_already_takes_the_place_of_the_chain(world: Any, compactor: Compactor) -> None:
    context = world.context([20, 16])
    tokens = np.concatenate([e.segment.token_ids for e in context.path])
    whole = world.store.add("", None, tokens, world.kv(36))
    compactor.consider(context.path[-1].segment)
    compact(compactor)
    assert [(e.segment, e.limit) for e in context.path] == [(whole, 36)]
    assert list(world.store) == [whole]


def test_nothing_is_merged_without_the_bytes_for_it(world: Any) -> None:
    asked = list[int]()

    def reserve(num_tokens: int) -> int | None:
        asked.append(num_tokens)
        return None if num_tokens > 40 else num_tokens

    compactor = Compactor(world.store, 16, reserve, lambda _: None, lambda *_: None)
    context = world.context([20, 18, 17])
    compactor.consider(context.path[-1].segment)
    compact(compactor)
    assert asked == [55, 35, 55], "then fewer of them, and those again once merged"
    assert [e.limit for e in context.path] == [20, 35]
    compactor.close()


def test_what_is_being_indexed_is_merged_later(world: Any, compactor: Compactor) -> None:
    context = world.context([20, 16])
    segment = context.path[0].segment
    segment.index_state = "building"
    compactor.consider(context.path[-1].segment)
    compact(compactor)
    assert len(context.path) == 2
    segment.index_state = "ready"
    compact(compactor)
    assert len(context.path) == 1


def test_a_merge_that_fails_leaves_everything_as_it_was(world: Any, caplog: Any) -> None:
    def fail(chain: Any, kv: KvBuffer) -> None:
        raise MemoryError("told to fail")

    given_back = list[int]()
    compactor = Compactor(world.store, 16, lambda tokens: tokens, given_back.append, lambda *_: None, fail)
    context = world.context([20, 16])
    path = context.path
    compactor.consider(path[-1].segment)
    compact(compactor)
    assert context.path == path
    assert given_back == [36]
    assert [e.segment.num_references for e in path] == [2, 1]
    assert "segments stay unmerged" in caplog.text
    compactor.close()


def test_closing_gives_up_what_is_under_way(world: Any) -> None:
    entered, go_on, given_back = threading.Event(), threading.Event(), list[int]()

    def index_of(chain: Any, kv: KvBuffer) -> None:
        entered.set()
        assert go_on.wait(30)

    compactor = Compactor(world.store, 16, lambda tokens: tokens, given_back.append, lambda *_: None, index_of)
    context = world.context([20, 16])
    compactor.consider(context.path[-1].segment)
    compactor.settle()
    assert entered.wait(30)
    timer = threading.Timer(0.05, go_on.set)
    timer.start()
    compactor.close()
    timer.join()
    assert len(context.path) == 2
    assert given_back == [36]


# --- random operations ---------------------------------------------------------------------------------------


def kv_of(tokens: list[int], begin: int, end: int) -> torch.Tensor:
    """What stands for K at positions `[begin, end)`: a number that depends on everything up to there."""
    sums = np.cumsum(np.asarray(tokens[:end], dtype=np.float64) * (1 + np.arange(end) % 7))
    return torch.tensor(sums[begin:end], dtype=torch.float32)


@dataclass
class Chats:
    """Contexts over a few texts that branch everywhere, and what must hold after every operation."""

    draw: random.Random
    store: SegmentStore = field(default_factory=SegmentStore)
    open_chats: list[tuple[Context, list[int]]] = field(default_factory=list)
    reserved: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.compactor = Compactor(self.store, STATIC.seal_tokens, self._reserve, self._release, self._count)

    def _reserve(self, num_tokens: int) -> int | None:
        if self.draw.random() < 0.2:
            return None
        self.reserved["bytes"] += num_tokens * TOKEN_BYTES
        return num_tokens * TOKEN_BYTES

    def _release(self, num_bytes: int) -> None:
        self.reserved["bytes"] -= num_bytes

    def _count(self, num_segments: int, num_tokens: int, seconds: float) -> None:
        self.reserved["merges"] += 1

    def text(self) -> list[int]:
        """A few texts with long common prefixes."""
        length, branch = self.draw.randint(2, 60), self.draw.randint(0, 60)
        return [1 + i % 3 if i < branch else 4 + self.draw.randint(0, 1) for i in range(length)]

    def extend(self, context: Context, tokens: list[int]) -> None:
        begin, count = context.num_tokens, len(tokens) - context.num_tokens
        context.tail.reserve(count)
        for layer_idx in range(TINY.num_layers):
            rows = kv_of(tokens, begin, len(tokens))[None, :, None]
            context.tail.write(layer_idx, rows + layer_idx, -rows - layer_idx)
        context.tail.commit(count)

    def open(self) -> None:
        tokens = self.text()
        ids = np.asarray(tokens, dtype=np.int32)
        context = open_context(TINY, STATIC, self.store, ids, salt="", capacity=len(tokens), device=CPU)
        self.extend(context, tokens)
        self.open_chats.append((context, tokens))

    def grow(self) -> None:
        context, tokens = self.draw.choice(self.open_chats)
        tokens += [4 + self.draw.randint(0, 1) for _ in range(self.draw.randint(1, 9))]
        self.extend(context, tokens)

    def seal(self) -> None:
        context, tokens = self.draw.choice(self.open_chats)
        num_kept = self.draw.choice([0, min(3, context.tail.length)])
        if context.tail.length - num_kept >= STATIC.seal_tokens:
            segment = context.seal(np.asarray(tokens, dtype=np.int32), num_kept)
            self.store.drop_superseded(segment)
            self.compactor.consider(segment)

    def fork(self) -> None:
        context, tokens = self.draw.choice(self.open_chats)
        self.open_chats.append((context.fork(), list(tokens)))

    def close(self) -> None:
        context, tokens = self.open_chats.pop(self.draw.randrange(len(self.open_chats)))
        if context.tail.length:
            self.store.drop_superseded(context.seal(np.asarray(tokens, dtype=np.int32)))
        context.close()

    def evict(self) -> None:
        idle = [s for s in self.store if s.num_references == 0]
        if idle:
            self.store.remove(self.draw.choice(idle))

    def settle(self) -> None:
        if self.draw.random() < 0.7:
            self.compactor.wait()
        self.compactor.settle()

    def step(self) -> None:
        operations = [self.open, self.settle, self.settle, self.evict]
        if self.open_chats:
            operations += [self.grow] * 4 + [self.seal] * 4 + [self.fork, self.close]
        if len(self.open_chats) > 6:
            operations = [self.close]
        self.draw.choice(operations)()

    def check(self) -> None:
        for context, tokens in self.open_chats:
            keys = torch.cat([run.kv.keys[1, 0, run.begin : run.end, 0] for run in context.runs()])
            assert torch.equal(keys, kv_of(tokens, 0, len(tokens)) + 1), "each position once, in order"
            above: PathEntry | None = None
            for entry in context.path:
                assert entry.segment.parent is (above.segment if above else None)
                assert entry.segment.parent_limit == (above.limit if above else 0)
                above = entry
        held = Counter[Segment](e.segment for hold in self.store.holds for e in hold.path)
        for segment in self.store:
            assert segment.num_references == held[segment] + len(segment.children)
            assert segment.start == (segment.parent.start + segment.parent_limit if segment.parent else 0)
            assert segment.num_tokens == segment.kv.length
            assert self.store.get(segment.digest) is segment
        assert set(held) <= set(self.store)
        assert self.reserved["bytes"] == self.compactor.reserved_bytes
        self.check_lookup()

    def check_lookup(self) -> None:
        tokens = np.asarray(self.text(), dtype=np.int32)
        best = max((common_prefix(whole_text(s), tokens) for s in self.store), default=0)
        path = self.store.longest_prefix(tokens, "")
        assert (path[-1].end if path else 0) == best


def whole_text(segment: Segment) -> Any:
    above = whole_text(segment.parent)[: segment.start] if segment.parent else np.empty(0, dtype=np.int32)
    return np.concatenate([above, segment.token_ids])


@pytest.mark.parametrize("seed", range(12))
def test_random_operations_keep_every_invariant(seed: int) -> None:
    chats = Chats(random.Random(seed))
    for _ in range(400):
        chats.step()
        chats.check()
    while chats.open_chats:
        chats.close()
        chats.check()
    compact(chats.compactor)
    chats.compactor.close()
    chats.check()
    assert chats.reserved["merges"] > 0
    assert chats.reserved["bytes"] == 0
    assert not chats.store.holds
    while len(chats.store):
        chats.evict()
