"""Named sessions: whose they are, what they hold and share, and what pins, forks, deletes and limits do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from retrieval import index as indexes
from retrieval.builder import IndexBuilder
from retrieval.context import Context
from server.engine.recorder import NullRecorder
from server.engine.request import Request
from server.engine.session_info import SessionInfo, SessionKey
from server.errors import ConflictError, DiskUnavailableError, NotFoundError
from server.sessions.budget import Budget
from server.sessions.manager import SessionManager
from server.sessions.registry import SessionRegistry
from tests.server.sessions.test_manager import GEOMETRY, STATIC, TOKEN_BYTES

DOC = SessionKey("", "", "doc")


class Recorder(NullRecorder):
    """Keeps the last report."""

    states: dict[str, int]
    num_pinned: int

    def sessions(self, num_by_state: Any, num_pinned: int) -> None:
        self.states = {state: number for state, number in num_by_state.items() if number}
        self.num_pinned = num_pinned


@dataclass
class Desk:
    """A registry over a manager, and a stand-in for the worker that computes random K and V."""

    manager: SessionManager
    registry: SessionRegistry
    recorder: Recorder
    now: float = 1000.0
    random: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    num_requests: int = 0

    def tokens(self, count: int) -> list[int]:
        return torch.randint(0, 1000, (count,), generator=self.random).tolist()

    def begin(self, tokens: list[int], key: SessionKey | None = DOC) -> tuple[Request, Context]:
        """A request that is admitted and has read nothing yet."""
        self.num_requests += 1
        names = {} if key is None else {"session_id": key.name, "session_owner": key.owner, "cache_salt": key.salt}
        request = Request(f"r{self.num_requests}", tuple(tokens), **names)
        self.registry.queued(request)
        context = self.manager.open(tokens, request.cache_salt, len(tokens) + 100)
        self.registry.opened(request, context)
        return request, context

    def compute(self, context: Context, count: int) -> None:
        context.tail.reserve(count)
        for layer_idx in range(GEOMETRY.num_layers):
            rows = torch.randn(2, 1, count, GEOMETRY.head_dim, generator=self.random)
            context.tail.write(layer_idx, rows[0], rows[1])
        context.tail.commit(count)

    def end(self, request: Request, context: Context, tokens: list[int], error: str | None = None) -> None:
        self.registry.closing(request, context, tokens)
        (self.manager.drop(context) if error else self.manager.close(context, tokens))
        self.registry.ended(request, error)

    def run(self, tokens: list[int], key: SessionKey | None = DOC) -> list[int]:
        """A whole request that reads `tokens` and answers nothing."""
        request, context = self.begin(tokens, key)
        self.compute(context, len(tokens) - context.num_tokens)
        self.manager.prompt_done(context, tokens)
        self.end(request, context, tokens)
        return tokens

    def get(self, name: str = "doc") -> SessionInfo:
        return self.registry.get(SessionKey("", "", name))

    def names(self, owner: str = "", salt: str = "") -> list[str]:
        return [info.name for info in self.registry.list(owner, salt, 1000, None).sessions]


@pytest.fixture
def make_desk() -> Iterator[Callable[..., Desk]]:
    made: list[SessionManager] = []

    def make(limit_tokens: int = 1 << 30, has_index: bool = False, prefix_caching: bool = True, **options: Any) -> Desk:
        recorder = Recorder()
        builder = IndexBuilder("flat", {}, STATIC.num_sink_tokens, recorder.index_build) if has_index else None
        budget, device = Budget(limit_tokens * TOKEN_BYTES), torch.device("cpu")
        manager = SessionManager(
            GEOMETRY, STATIC, builder, budget, recorder, device=device, prefix_caching=prefix_caching
        )
        made.append(manager)
        desk = Desk(manager, None, recorder)  # type: ignore[arg-type]
        desk.registry = SessionRegistry(manager, recorder, clock=lambda: desk.now, **options)
        return desk

    yield make
    for manager in made:
        manager.shutdown()


@pytest.fixture
def desk(make_desk: Callable[..., Desk]) -> Desk:
    return make_desk()


def evict_all(desk: Desk) -> None:
    desk.manager.reserve(desk.manager.budget.limit_bytes - desk.manager.pinned_bytes)
    desk.manager.release(desk.manager.budget.reserved_bytes)


# --- what a session tells -------------------------------------------------------------------------------


def test_a_request_that_names_a_session_makes_it_and_others_do_not(desk: Desk) -> None:
    desk.run(desk.tokens(100), None)
    assert desk.names() == []
    desk.run(desk.tokens(100))
    assert desk.names() == ["doc"]


def test_a_session_goes_from_prefilling_to_ready(desk: Desk) -> None:
    tokens = desk.tokens(100)
    request, context = desk.begin(tokens)
    desk.compute(context, 40)
    info = desk.get()
    assert (info.state, info.num_prefilled_tokens, info.num_prompt_tokens) == ("prefilling", 40, 100)
    assert (info.num_running, info.bytes.tail, info.num_tokens) == (1, 40 * TOKEN_BYTES, 40)
    desk.compute(context, 60)
    desk.end(request, context, tokens)
    info = desk.get()
    assert (info.state, info.num_prefilled_tokens, info.num_prompt_tokens) == ("ready", 0, 0)
    assert (info.num_running, info.bytes.tail, info.bytes.host_kv) == (0, 0, 100 * TOKEN_BYTES)
    assert (info.num_tokens, info.num_tokens_in_memory) == (100, 100)


def test_hits_and_cached_tokens_count_what_was_not_read_again(desk: Desk) -> None:
    tokens = desk.run(desk.tokens(100))
    desk.now = 2000.0
    desk.run([*tokens, *desk.tokens(30)])
    info = desk.get()
    assert (info.num_requests, info.num_hits, info.num_cached_tokens) == (2, 1, 100)
    assert (info.created, info.last_used) == (1000.0, 2000.0)
    assert info.num_tokens == 130


def test_a_session_too_short_to_be_kept_is_empty(desk: Desk) -> None:
    desk.run(desk.tokens(10))
    assert (desk.get().state, desk.get().num_tokens) == ("empty", 0)


def test_a_session_keeps_its_context_when_a_request_brings_less(desk: Desk) -> None:
    tokens = desk.run(desk.tokens(100))
    desk.run(tokens[:60])
    assert desk.get().num_tokens == 100
    request, context = desk.begin(desk.tokens(50))
    desk.end(request, context, [], error="it failed")
    assert (desk.get().num_tokens, desk.get().error) == (100, "it failed")
    other = desk.run(desk.tokens(50))
    assert (desk.get().num_tokens, desk.get().error) == (len(other), None)


def test_an_evicted_session_says_so(make_desk: Any) -> None:
    desk = make_desk(limit_tokens=200)
    desk.run(desk.tokens(100))
    evict_all(desk)
    assert (desk.get().state, desk.get().num_tokens, desk.get().num_tokens_in_memory) == ("evicted", 100, 0)
    with pytest.raises(ConflictError, match="0 of its 100 tokens"):
        desk.registry.restore(DOC)


def test_index_progress_follows_the_build(make_desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, real_build = threading.Event(), indexes.build

    def build(*args: Any, **options: Any) -> Any:
        assert go_on.wait(30)
        return real_build(*args, **options)

    monkeypatch.setattr(indexes, "build", build)
    desk = make_desk(has_index=True)
    desk.run(desk.tokens(100))
    assert (desk.get().state, desk.get().index_progress) == ("indexing", 0.0)
    go_on.set()
    desk.manager.wait_for_indexes()
    info = desk.get()
    assert (info.state, info.index_progress) == ("ready", 1.0)
    assert info.bytes.host_index == sum(s.index_bytes for s in desk.manager.store)


def test_without_prefix_caching_sessions_hold_nothing(make_desk: Any) -> None:
    desk = make_desk(prefix_caching=False)
    desk.run(desk.tokens(100))
    assert (desk.get().state, desk.get().bytes.host_kv) == ("empty", 0)


# --- whose it is ----------------------------------------------------------------------------------------


def test_sessions_of_another_owner_or_salt_are_neither_seen_nor_touched(desk: Desk) -> None:
    tokens = desk.tokens(100)
    keys = [SessionKey("me", "", "doc"), SessionKey("you", "", "doc"), SessionKey("me", "salt", "doc")]
    for key in keys:
        desk.run([*tokens, *desk.tokens(20)], key)
    assert desk.names("me") == desk.names("you") == desk.names("me", "salt") == ["doc"]
    assert desk.names("you", "salt") == desk.names() == []
    desk.registry.delete(keys[0])
    assert desk.names("me") == []
    assert desk.registry.get(keys[1]).state == desk.registry.get(keys[2]).state == "ready"
    for operation in (
        desk.registry.get,
        desk.registry.delete,
        desk.registry.restore,
        desk.registry.begin_save,
        lambda key: desk.registry.pin(key, 1.0),
        lambda key: desk.registry.fork(key, "mine"),
    ):
        with pytest.raises(NotFoundError):
            operation(SessionKey("you", "salt", "doc"))


# --- forks ----------------------------------------------------------------------------------------------


def test_forks_cost_their_own_tail_only(desk: Desk) -> None:
    document = desk.run(desk.tokens(400))
    for i in range(20):
        desk.registry.fork(DOC, f"fork{i}")
    assert desk.registry.list("", "", 1000, None).bytes.host_kv == 400 * TOKEN_BYTES
    for i in range(20):
        desk.run([*document, *desk.tokens(20)], SessionKey("", "", f"fork{i}"))
    found = desk.registry.list("", "", 1000, None)
    assert found.bytes.host_kv == (400 + 20 * 20) * TOKEN_BYTES == desk.manager.held_bytes()
    info = desk.get("fork3")
    assert (info.bytes.own, info.bytes.shared) == (20 * TOKEN_BYTES, 400 * TOKEN_BYTES)
    assert info.bytes.own + info.bytes.shared == info.bytes.host_kv + info.bytes.host_index


def test_a_fork_goes_its_own_way(desk: Desk) -> None:
    document = desk.run(desk.tokens(100))
    desk.registry.fork(DOC, "fork")
    desk.run([*document, *desk.tokens(50)], SessionKey("", "", "fork"))
    assert (desk.get().num_tokens, desk.get("fork").num_tokens) == (100, 150)


def test_forks_onto_a_name_or_of_nothing_are_refused(desk: Desk) -> None:
    desk.run(desk.tokens(10))
    with pytest.raises(ConflictError, match="holds nothing"):
        desk.registry.fork(DOC, "fork")
    desk.run(desk.tokens(100))
    desk.registry.fork(DOC, "fork")
    with pytest.raises(ConflictError, match="already"):
        desk.registry.fork(DOC, "fork")


# --- deletion -------------------------------------------------------------------------------------------


def test_deletion_frees_what_nobody_else_needs(desk: Desk) -> None:
    document = desk.run(desk.tokens(400))
    desk.registry.fork(DOC, "fork")
    desk.run([*document, *desk.tokens(50)], SessionKey("", "", "fork"))
    assert desk.registry.delete(SessionKey("", "", "fork")) == 50 * TOKEN_BYTES
    assert desk.get().num_tokens_in_memory == 400
    assert desk.registry.delete(DOC) == 400 * TOKEN_BYTES
    assert (desk.manager.held_bytes(), desk.names()) == (0, [])


def test_deletion_takes_the_turns_that_were_left_behind_too(desk: Desk) -> None:
    document = desk.run(desk.tokens(400))
    for _ in range(3):
        desk.run([*document, *desk.tokens(40)])
    assert desk.registry.delete(DOC) == desk.manager.held_bytes() + (400 + 3 * 40) * TOKEN_BYTES
    assert desk.manager.held_bytes() == 0


def test_deletion_leaves_what_a_request_without_a_name_runs_on(desk: Desk) -> None:
    document = desk.run(desk.tokens(400))
    _, context = desk.begin([*document, *desk.tokens(40)], None)
    assert desk.registry.delete(DOC) == 0
    assert context.num_tokens == 400
    context.close()


def test_a_session_with_a_request_under_way_cannot_be_deleted(desk: Desk) -> None:
    tokens = desk.tokens(100)
    request, context = desk.begin(tokens)
    with pytest.raises(ConflictError) as caught:
        desk.registry.delete(DOC)
    assert caught.value.code == "session_busy"
    desk.end(request, context, tokens)
    desk.registry.delete(DOC)


# --- pins -----------------------------------------------------------------------------------------------


def test_pinned_sessions_survive_pressure_until_their_time_is_over(make_desk: Any) -> None:
    desk = make_desk(limit_tokens=300)
    desk.run(desk.tokens(100))
    desk.run(desk.tokens(100), SessionKey("", "", "other"))
    info = desk.registry.pin(DOC, 60.0)
    assert (info.is_pinned, info.pinned_until) == (True, 1060.0)
    assert desk.registry.seconds_to_expiry() == 60.0
    evict_all(desk)
    assert (desk.get().state, desk.get("other").state) == ("ready", "evicted")
    assert desk.manager.pinned_bytes == 100 * TOKEN_BYTES
    desk.now = 1060.0
    desk.registry.expire()
    assert (desk.manager.pinned_bytes, desk.registry.seconds_to_expiry()) == (0, None)
    evict_all(desk)
    assert (desk.get().state, desk.get().is_pinned) == ("evicted", False)


def test_a_pin_without_an_end_ends_by_unpinning(make_desk: Any) -> None:
    desk = make_desk(limit_tokens=300)
    desk.run(desk.tokens(100))
    assert desk.registry.pin(DOC, None).pinned_until is None
    desk.now = 1e12
    evict_all(desk)
    assert (desk.get().state, desk.registry.seconds_to_expiry()) == ("ready", None)
    assert not desk.registry.pin(DOC, 0).is_pinned
    evict_all(desk)
    assert desk.get().state == "evicted"


def test_a_pin_follows_the_session_as_it_grows(make_desk: Any) -> None:
    desk = make_desk(limit_tokens=1000)
    tokens = desk.run(desk.tokens(100))
    desk.registry.pin(DOC, None)
    desk.registry.pin(DOC, 60.0)  # again: one pin, with a new end
    for _ in range(4):
        tokens = desk.run([*tokens, *desk.tokens(60)])
        evict_all(desk)
        assert (desk.get().state, desk.get().num_tokens_in_memory) == ("ready", len(tokens))
    desk.registry.pin(DOC, 0)
    assert desk.manager.pinned_bytes == 0
    evict_all(desk)
    assert desk.manager.held_bytes() == 0


def test_a_pin_survives_a_merge(make_desk: Any) -> None:
    desk = make_desk(limit_tokens=5000)
    tokens = desk.run(desk.tokens(100))
    desk.registry.pin(DOC, None)
    for _ in range(30):
        tokens = desk.run([*tokens, *desk.tokens(40)])
        desk.manager.wait_for_indexes()
    assert len(desk.manager.store) < 30, "nothing was merged: the test tests nothing"
    evict_all(desk)
    assert (desk.get().state, desk.get().num_tokens_in_memory) == ("ready", len(tokens))
    assert desk.manager.pinned_bytes == len(tokens) * TOKEN_BYTES
    desk.registry.delete(DOC)
    assert desk.manager.held_bytes() == 0


def test_what_is_evicted_or_too_much_cannot_be_pinned(make_desk: Any) -> None:
    desk = make_desk(limit_tokens=300, max_sessions=1)
    desk.run(desk.tokens(100))
    evict_all(desk)
    with pytest.raises(ConflictError) as caught:
        desk.registry.pin(DOC, None)
    assert caught.value.code == "session_evicted"
    desk.run(desk.tokens(100))
    desk.registry.pin(DOC, None)
    desk.run(desk.tokens(100), SessionKey("", "", "other"))
    with pytest.raises(ConflictError) as caught:
        desk.registry.pin(SessionKey("", "", "other"), None)
    assert caught.value.code == "session_limit"


# --- limits, reports, disk ------------------------------------------------------------------------------


def test_the_longest_unused_names_are_forgotten_but_not_pinned_or_running_ones(make_desk: Any) -> None:
    desk = make_desk(max_sessions=2)
    request, context = desk.begin(desk.tokens(50), SessionKey("", "", "running"))
    for i in range(5):
        desk.now += 1
        desk.run(desk.tokens(50), SessionKey("", "", f"s{i}"))
        if i == 0:
            desk.registry.pin(SessionKey("", "", "s0"), None)
    assert sorted(desk.names()) == ["running", "s0", "s3", "s4"]
    desk.end(request, context, [])


def test_pages_go_from_the_last_used_on(desk: Desk) -> None:
    for i in range(5):
        desk.now += 1
        desk.run(desk.tokens(20), SessionKey("", "", f"s{i}"))
    first = desk.registry.list("", "", 2, None)
    assert ([i.name for i in first.sessions], first.num_sessions, first.has_more) == (["s4", "s3"], 5, True)
    last = desk.registry.list("", "", 3, "s3")
    assert ([i.name for i in last.sessions], last.has_more) == (["s2", "s1", "s0"], False)
    with pytest.raises(NotFoundError):
        desk.registry.list("", "", 3, "s9")


def test_reports_count_sessions_by_state(make_desk: Any) -> None:
    desk = make_desk(limit_tokens=1000)
    desk.registry.report()
    assert (desk.recorder.states, desk.recorder.num_pinned) == ({}, 0)
    for i in range(40):
        desk.run(desk.tokens(20), SessionKey("", "", f"s{i}"))
    desk.registry.pin(SessionKey("", "", "s0"), 1.5)
    desk.registry.report()
    assert (desk.recorder.states, desk.recorder.num_pinned) == ({"ready": 40}, 1)
    evict_all(desk)
    for _ in range(4):  # not all are searched for at once
        desk.now += 1.0
        desk.registry.report()
    assert (desk.recorder.states, desk.recorder.num_pinned) == ({"evicted": 39, "ready": 1}, 0)


def test_without_a_disk_nothing_can_be_saved(desk: Desk) -> None:
    desk.run(desk.tokens(100))
    with pytest.raises(DiskUnavailableError, match="--kv-disk-path"):
        desk.registry.begin_save(DOC)
    assert desk.registry.restore(DOC).state == "ready"
