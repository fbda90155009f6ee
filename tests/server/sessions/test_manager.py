"""Contexts under one budget: what is kept, what gives way, and that every byte comes back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from retrieval import index as indexes
from retrieval.builder import IndexBuilder
from retrieval.context import Context, StaticSet
from retrieval.geometry import Geometry
from server.engine.recorder import NullRecorder
from server.sessions.budget import Budget
from server.sessions.manager import MIN_KEPT_TOKENS, SessionManager

GEOMETRY = Geometry(2, 2, 1, 8, torch.float32, (None, None))
STATIC = StaticSet(num_sink_tokens=4, window_size=8, seal_tokens=32)
TOKEN_BYTES = GEOMETRY.kv_bytes_per_token


class Recorder(NullRecorder):
    """Keeps the evictions."""

    def __init__(self) -> None:
        self.evictions: list[tuple[str, str, int]] = []

    def eviction(self, tier: str, reason: str, num_bytes: int) -> None:
        self.evictions.append((tier, reason, num_bytes))


@dataclass
class Server:
    """A manager, and a stand-in for the engine that computes random K and V."""

    manager: SessionManager
    recorder: Recorder
    random: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def tokens(self, count: int) -> list[int]:
        return torch.randint(0, 1000, (count,), generator=self.random).tolist()

    def compute(self, context: Context, count: int) -> None:
        context.tail.reserve(count)
        for layer_idx in range(GEOMETRY.num_layers):
            rows = torch.randn(2, 1, count, GEOMETRY.head_dim, generator=self.random)
            context.tail.write(layer_idx, rows[0], rows[1])
        context.tail.commit(count)

    def open(self, tokens: list[int], salt: str = "") -> Context:
        """A context with the whole prompt computed and sealed as the engine does it."""
        context = self.manager.open(tokens, salt, len(tokens) + 100)
        self.compute(context, len(tokens) - context.num_tokens)
        self.manager.prompt_done(context, tokens)
        return context

    def run(self, tokens: list[int], num_new: int = 2, salt: str = "") -> list[int]:
        """A whole request; returns its tokens with the answer, whose last one is never computed."""
        context = self.open(tokens, salt)
        answer = self.tokens(num_new)
        self.compute(context, num_new - 1)
        self.manager.close(context, [*tokens, *answer])
        return [*tokens, *answer]


@pytest.fixture
def make_server() -> Iterator[Callable[..., Server]]:
    made: list[SessionManager] = []

    def make(limit_tokens: int = 1 << 30, has_index: bool = False, **options: Any) -> Server:
        recorder = Recorder()
        builder = IndexBuilder("flat", {}, STATIC.num_sink_tokens, recorder.index_build) if has_index else None
        budget = Budget(limit_tokens * TOKEN_BYTES)
        device = torch.device("cpu")
        manager = SessionManager(GEOMETRY, STATIC, builder, budget, recorder, device=device, **options)
        made.append(manager)
        return Server(manager, recorder)

    yield make
    for manager in made:
        manager.shutdown()


def held_tokens(server: Server) -> int:
    assert server.manager.held_bytes() % TOKEN_BYTES == 0
    return server.manager.held_bytes() // TOKEN_BYTES


# --- reuse ----------------------------------------------------------------------------------------------


def test_a_later_prompt_finds_what_an_earlier_one_left(make_server: Any) -> None:
    server = make_server()
    whole = server.run(server.tokens(40), num_new=20)
    context = server.manager.open([*whole, 1, 2], "", 100)
    assert context.num_tokens == 59  # all but the token that was sampled last
    context.close()


def test_salts_see_nothing_of_each_other(make_server: Any) -> None:
    server = make_server()
    whole = server.run(server.tokens(40), num_new=20, salt="ours")
    assert server.manager.open(whole, "theirs", 100).num_tokens == 0
    assert server.manager.open(whole, "ours", 100).num_tokens == 59


def test_a_long_prompt_is_sealed_at_its_end_and_a_short_one_is_not(make_server: Any) -> None:
    server = make_server()
    for length, sealed in ((STATIC.seal_tokens - 1, 0), (STATIC.seal_tokens, STATIC.seal_tokens)):
        tokens = server.tokens(length)
        context = server.manager.open(tokens, "", 100)
        server.compute(context, length)
        assert server.manager.prompt_done(context, tokens) == sealed
        assert context.num_tokens == length
        server.manager.drop(context)


def test_a_tail_that_has_grown_is_sealed_but_for_its_window(make_server: Any) -> None:
    server = make_server()
    tokens = server.tokens(10)
    context = server.open(tokens)
    moved = []
    for _ in range(60):
        tokens.append(1)
        server.compute(context, 1)
        moved.append(server.manager.grown(context, tokens))
    assert [m for m in moved if m] == [32]
    assert moved.index(32) + 1 + 10 == STATIC.window_size + STATIC.seal_tokens
    assert context.num_tokens == 70
    assert context.tail.length == 70 - 32 >= STATIC.window_size


def test_what_is_too_short_is_not_kept(make_server: Any) -> None:
    server = make_server()
    server.run(server.tokens(MIN_KEPT_TOKENS - 2), num_new=2)
    assert held_tokens(server) == 0
    server.run(server.tokens(MIN_KEPT_TOKENS - 1), num_new=2)
    assert held_tokens(server) == MIN_KEPT_TOKENS


@pytest.mark.parametrize("num_first", [20, 30])
def test_superseded_turns_of_a_short_chat_vanish(make_server: Any, num_first: int) -> None:
    server = make_server()
    chat = server.tokens(num_first)
    for _ in range(6):
        chat = [*server.run(chat, num_new=20), *server.tokens(3)]
    held = [s.num_tokens for s in server.manager.store]
    assert sum(held) == len(chat) - 3 - 1, "each token of the chat is held once"


def test_superseded_turns_over_a_document_vanish_and_the_document_stays(make_server: Any) -> None:
    server = make_server()
    chat = server.tokens(100)
    for _ in range(5):
        chat = [*server.run(chat, num_new=20), *server.tokens(2)]
    lengths = [s.num_tokens for s in server.manager.store]
    assert lengths[0] == 100
    assert sum(lengths) == len(chat) - 2 - 1


def test_two_chats_over_one_document_hold_it_once(make_server: Any) -> None:
    server = make_server()
    document = server.tokens(100)
    server.run(document)
    for _ in range(3):
        server.run([*document, *server.tokens(20)])
    assert sum(s.num_tokens >= 100 for s in server.manager.store) == 1


def test_without_prefix_caching_nothing_is_reused_and_nothing_stays(make_server: Any) -> None:
    server = make_server(prefix_caching=False)
    tokens = server.tokens(100)
    for _ in range(2):
        context = server.open(tokens)
        assert context.path[0].segment.num_hits == 0
        server.compute(context, 5)
        server.manager.close(context, [*tokens, *range(6)])
        assert held_tokens(server) == 0
    first, second = server.open(tokens), server.open(tokens)
    server.manager.drop(first)
    assert held_tokens(server) == 100, "the second one still holds it"
    server.manager.drop(second)
    assert (held_tokens(server), len(server.manager.store)) == (0, 0)


# --- the budget -----------------------------------------------------------------------------------------


def test_what_the_process_takes_besides_evicts_but_refuses_nobody(make_server: Any) -> None:
    server = make_server(limit_tokens=100)
    for _ in range(2):
        server.run(server.tokens(40), num_new=1)
    server.manager.budget.overhead_bytes = 15 * TOKEN_BYTES
    assert server.manager.reserve(10 * TOKEN_BYTES)
    assert [tier for tier, _, _ in server.recorder.evictions] == ["host"]
    assert server.manager.held_bytes() == 40 * TOKEN_BYTES
    assert server.manager.reserve(90 * TOKEN_BYTES), "an empty server could run it"
    assert server.manager.held_bytes() == 0


def test_worst_case_counts_an_index_where_there_may_be_one(make_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IndexBuilder, "most_bytes", lambda self, geometry, num_tokens, **_: 1_000_000 + num_tokens)
    plain, indexed = make_server().manager, make_server(has_index=True).manager
    each = STATIC.seal_tokens
    assert plain.worst_case_bytes(1000) == 1000 * TOKEN_BYTES

    def index_bytes(num_prompt: int, num_decoded: int) -> int:
        num_tokens = num_prompt + num_decoded
        return int(indexed.worst_case_bytes(num_tokens, num_decoded) - num_tokens * TOKEN_BYTES)

    assert index_bytes(1000, 0) == 1_000_000 + 1000
    assert index_bytes(1000, 3 * each) == 4_000_000 + 1000 + 3 * each, "what is decoded is sealed piece by piece"
    assert index_bytes(each - 1, 0) == 0, "too short for an index"
    assert index_bytes(each - 1, 1) == 1_000_000 + each, "with what is decoded it is not"


def test_reserve_evicts_idle_segments_to_make_room(make_server: Any) -> None:
    server = make_server(limit_tokens=100)
    server.run(server.tokens(40), num_new=1)
    server.run(server.tokens(40), num_new=1)
    assert server.manager.reserve(20 * TOKEN_BYTES)
    assert (held_tokens(server), server.recorder.evictions) == (80, [])
    assert server.manager.reserve(10 * TOKEN_BYTES)
    assert held_tokens(server) == 40
    assert server.recorder.evictions == [("host", "budget", 40 * TOKEN_BYTES)]
    assert server.manager.reserve(70 * TOKEN_BYTES)
    assert held_tokens(server) == 0


def test_reserve_says_not_now_and_takes_nothing_when_it_cannot(make_server: Any) -> None:
    server = make_server(limit_tokens=100)
    context = server.open(server.tokens(60))
    assert not server.manager.reserve(41 * TOKEN_BYTES)
    assert server.manager.budget.reserved_bytes == 0
    assert server.manager.reserve(40 * TOKEN_BYTES)
    assert not server.manager.reserve(1)
    server.manager.drop(context)
    assert server.manager.reserve(60 * TOKEN_BYTES)


def test_what_a_context_holds_is_never_evicted(make_server: Any) -> None:
    server = make_server(limit_tokens=200)
    tokens = server.tokens(50)
    whole = server.run([*tokens, *server.tokens(40)], num_new=1)
    context = server.manager.open([*tokens, 1], "", 100)  # sees the first 50 tokens only
    other = server.open(server.tokens(60))
    server.manager.drop(other)
    assert not server.manager.reserve(200 * TOKEN_BYTES)
    assert [s.num_tokens for s in server.manager.store] == [90, 60]  # nothing is evicted in vain
    assert server.manager.reserve(100 * TOKEN_BYTES)
    assert [s.num_tokens for s in server.manager.store] == [90]
    server.manager.release(100 * TOKEN_BYTES)
    assert torch.equal(context.runs()[0].kv.keys, context.path[0].segment.kv.keys)
    server.manager.drop(context)
    assert server.manager.reserve(200 * TOKEN_BYTES)
    assert held_tokens(server) == 0
    assert server.manager.open(whole, "", 100).num_tokens == 0


def test_a_parent_of_what_a_context_holds_is_never_evicted(make_server: Any) -> None:
    server = make_server(limit_tokens=100)
    document = server.tokens(40)
    context = server.open(document)
    server.compute(context, 35)
    tokens = [*document, *server.tokens(35)]
    server.manager.prompt_done(context, tokens)
    path = [e.segment for e in context.path]
    assert len(path) == 2
    server.manager.drop(context)
    again = server.manager.open([*tokens, 1], "", 100)
    assert not server.manager.reserve(100 * TOKEN_BYTES)
    assert set(server.manager.store) == set(path)
    server.manager.drop(again)


def test_release_evicts_what_segments_hold_too_much(make_server: Any) -> None:
    server = make_server(limit_tokens=100)
    assert server.manager.reserve(60 * TOKEN_BYTES)
    server.run(server.tokens(50), num_new=1)
    server.run(server.tokens(60), num_new=1)
    server.manager.release(60 * TOKEN_BYTES)
    assert held_tokens(server) <= 100
    assert held_tokens(server) > 0, "no more than needed goes"


def test_the_least_recently_used_goes_first(make_server: Any) -> None:
    server = make_server(limit_tokens=100)
    first, second = server.tokens(45), server.tokens(45)
    server.run(first, num_new=1)
    server.run(second, num_new=1)
    for segment, last_used in zip(server.manager.store, (1.0, 2.0), strict=True):
        segment.last_used = last_used
    server.manager.open([*first, 1], "", 100).close()
    assert server.manager.reserve(20 * TOKEN_BYTES)
    assert [s.token_ids.tolist() for s in server.manager.store] == [first]


@pytest.mark.parametrize("has_index", [False, True])
def test_bytes_return_to_where_they_began(make_server: Any, has_index: bool) -> None:
    server = make_server(limit_tokens=1000, has_index=has_index)
    for _ in range(3):
        tokens = server.tokens(150)
        needed = server.manager.worst_case_bytes(160)
        assert server.manager.reserve(needed)
        context = server.open(tokens)
        twin = context.fork()
        for each in (context, twin):
            server.compute(each, 9)
            server.manager.close(each, [*tokens, *server.tokens(10)])
        server.manager.release(needed)
    server.manager.wait_for_indexes()
    stats = server.manager.stats()
    assert stats.reserved_bytes == 0
    assert stats.kv_bytes == 3 * 150 * TOKEN_BYTES, "two answers of nine tokens are too short to keep"
    assert stats.num_segments == 3
    assert all(s.num_references == len(s.children) == 0 for s in server.manager.store)
    assert server.manager.reserve(1000 * TOKEN_BYTES)
    assert server.manager.stats().num_segments == 0
    server.manager.release(1000 * TOKEN_BYTES)


def test_stats_count_indexes_by_themselves(make_server: Any) -> None:
    server = make_server(has_index=True)
    server.run(server.tokens(100))
    server.manager.wait_for_indexes()
    (segment,) = server.manager.store
    segment.index = type("Stub", (), {"begin": 4, "nbytes": 77})()
    stats = server.manager.stats()
    assert (stats.kv_bytes, stats.index_bytes) == (100 * TOKEN_BYTES, 77)
    assert server.manager.held_bytes() == 100 * TOKEN_BYTES + 77


# --- indexes --------------------------------------------------------------------------------------------


def test_long_segments_are_indexed_and_short_ones_are_not(make_server: Any) -> None:
    server = make_server(has_index=True)
    server.run(server.tokens(STATIC.seal_tokens))
    server.run(server.tokens(STATIC.seal_tokens - 5))
    server.manager.wait_for_indexes()
    states = {s.num_tokens >= STATIC.seal_tokens: s.index_state for s in server.manager.store}
    assert states == {True: "ready", False: "none"}


def test_a_segment_being_indexed_is_not_evicted(make_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, real_build = threading.Event(), indexes.build

    def build(*args: Any, **options: Any) -> Any:
        assert go_on.wait(30)
        return real_build(*args, **options)

    monkeypatch.setattr(indexes, "build", build)
    server = make_server(limit_tokens=100, has_index=True)
    server.run(server.tokens(60), num_new=1)
    assert server.manager.num_pending_builds == 1
    assert not server.manager.reserve(100 * TOKEN_BYTES)
    assert held_tokens(server) == 60
    go_on.set()
    server.manager.wait_for_indexes()
    assert server.manager.num_pending_builds == 0
    assert server.manager.reserve(100 * TOKEN_BYTES)
    assert held_tokens(server) == 0


def test_a_reused_segment_without_an_index_gets_one(make_server: Any) -> None:
    server = make_server(has_index=True)
    whole = server.run(server.tokens(100))
    (segment,) = server.manager.store
    server.manager.wait_for_indexes()
    segment.index, segment.index_state = None, "none"
    server.manager.open([*whole, 1], "", 200)
    server.manager.wait_for_indexes()
    assert segment.index_state == "ready"


# --- merging --------------------------------------------------------------------------------------------


def test_turns_of_one_chat_stay_a_short_path_and_every_byte_is_counted(make_server: Any) -> None:
    server = make_server(limit_tokens=4000)
    manager = server.manager
    whole = server.tokens(20)
    lengths = list[int]()
    for _ in range(40):
        whole = server.run([*whole, *server.tokens(12)], num_new=9)
        manager.settle()
        manager.wait_for_indexes()
        context = manager.open([*whole, 1], "", len(whole) + 9)
        assert context.num_tokens >= len(whole) - MIN_KEPT_TOKENS
        lengths.append(len(context.path))
        manager.drop(context)
    assert len(whole) > 20 * STATIC.seal_tokens
    assert max(lengths) <= 6
    assert len(whole) - MIN_KEPT_TOKENS <= held_tokens(server) < len(whole)
    assert manager.budget.reserved_bytes == 0
    assert server.recorder.evictions == []


def test_a_merge_that_finds_no_room_costs_nothing(make_server: Any) -> None:
    server = make_server(limit_tokens=120)
    manager = server.manager
    context = server.open(server.tokens(40))
    assert manager.reserve(60 * TOKEN_BYTES)  # what else runs
    server.compute(context, 40)
    manager.grown(context, server.tokens(80))
    manager.settle()
    assert (manager.num_pending_builds, len(context.path)) == (0, 2)
    assert manager.budget.reserved_bytes == 60 * TOKEN_BYTES
