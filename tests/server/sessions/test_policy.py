"""What is evicted first."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from server.sessions import policy
from server.sessions.policy import Candidate, Victim


def candidate(key: str, parent: str | None = None, num_references: int = 0, **options: Any) -> Candidate:
    facts = {"num_bytes": 100, "restore_seconds": 1.0, "idle_seconds": 10.0} | options
    return Candidate(key.encode(), parent.encode() if parent else None, num_references=num_references, **facts)


def choose_victims(candidates: list[Candidate], num_bytes: int) -> list[bytes]:
    """Keys of what is evicted whole."""
    return [victim.key for victim in policy.choose_victims(candidates, num_bytes) if victim.part == "segment"]


def test_nothing_is_evicted_for_nothing() -> None:
    assert choose_victims([candidate("a")], 0) == []


def test_evicts_only_as_much_as_is_asked_for() -> None:
    three = [candidate("a", idle_seconds=3.0), candidate("b", idle_seconds=2.0), candidate("c", idle_seconds=1.0)]
    assert choose_victims(three, 1) == [b"a"]
    assert choose_victims(three, 100) == [b"a"]
    assert choose_victims(three, 101) == [b"a", b"b"]
    assert choose_victims(three, 10_000) == [b"a", b"b", b"c"]


def test_the_longest_idle_goes_first() -> None:
    assert choose_victims([candidate("new", idle_seconds=1.0), candidate("old", idle_seconds=9.0)], 1) == [b"old"]


def test_the_cheapest_to_rebuild_goes_first() -> None:
    dear, cheap = candidate("dear", restore_seconds=9.0), candidate("cheap", restore_seconds=1.0)
    assert choose_victims([dear, cheap], 1) == [b"cheap"]


def test_the_one_that_frees_most_goes_first() -> None:
    small, large = candidate("small", num_bytes=10), candidate("large", num_bytes=1000)
    assert choose_victims([small, large], 1) == [b"large"]


def test_leaves_go_before_what_they_continue() -> None:
    document = candidate("document", num_references=2, idle_seconds=1e6)
    questions = [candidate("q1", "document", idle_seconds=2.0), candidate("q2", "document", idle_seconds=1.0)]
    assert choose_victims([document, *questions], 10_000) == [b"q1", b"q2", b"document"]


def test_a_parent_with_a_child_in_use_is_never_evicted() -> None:
    document = candidate("document", num_references=2)
    assert choose_victims([document, candidate("idle", "document")], 10_000) == [b"idle"]


forests = st.lists(
    st.tuples(st.integers(-1, 8), st.booleans(), st.integers(1, 50), st.floats(0, 9), st.floats(0, 9)), max_size=9
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(forest=forests, num_bytes=st.integers(0, 300))
def test_victims_are_leaves_when_their_turn_comes_and_no_more_than_needed(
    forest: list[tuple[int, bool, int, float, float]], num_bytes: int
) -> None:
    parents = {i: (p if p < i else -1) for i, (p, *_) in enumerate(forest)}
    is_used = {i: used for i, (_, used, *_) in enumerate(forest)}
    idle = [i for i in parents if not is_used[i]]
    candidates = [
        Candidate(
            key=bytes([i]),
            parent=bytes([parents[i]]) if parents[i] >= 0 else None,
            num_bytes=forest[i][2],
            restore_seconds=forest[i][3],
            idle_seconds=forest[i][4],
            num_references=sum(p == i for p in parents.values()),
        )
        for i in idle
    ]
    victims = [key[0] for key in choose_victims(candidates, num_bytes)]
    assert len(set(victims)) == len(victims)
    left = dict(parents)
    for victim in victims:
        assert not is_used[victim]
        assert victim not in left.values(), "nothing that is left continues a victim"
        del left[victim]
    freed = [forest[v][2] for v in victims]
    assert sum(freed[:-1]) < max(1, num_bytes)
    if sum(freed) < num_bytes:
        assert all(is_used[i] or i in left.values() for i in left), "all that could go has gone"


def test_a_segment_without_bytes_has_a_finite_cost() -> None:
    assert candidate("empty", num_bytes=0).cost < float("inf")


def test_what_was_found_more_often_stays_longer() -> None:
    assert choose_victims([candidate("often", num_hits=9, idle_seconds=20.0), candidate("once")], 1) == [b"once"]


def test_an_index_goes_first_where_that_is_cheaper_and_its_bytes_count_once() -> None:
    both = [
        candidate("dear index", idle_seconds=2.0, index_bytes=10, index_seconds=9.0),
        candidate("cheap index", idle_seconds=1.0, index_bytes=10, index_seconds=0.001),
    ]
    assert policy.choose_victims(both, 10) == [Victim(b"cheap index", "index", 10)]
    assert policy.choose_victims(both, 200) == [
        Victim(b"cheap index", "index", 10),
        Victim(b"dear index", "segment", 100),
        Victim(b"cheap index", "segment", 90),
    ]


def test_an_index_may_go_though_its_segment_is_continued() -> None:
    document = candidate("document", num_references=1, index_bytes=10, index_seconds=0.001)
    assert policy.choose_victims([document], 100) == [Victim(b"document", "index", 10)]
