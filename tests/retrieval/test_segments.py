"""Segments are found by content, shared by reference count, and kept apart by salt."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.geometry import Geometry
from retrieval.kv_buffer import KvBuffer
from retrieval.segments import Path, PathEntry, Segment, SegmentStore, TokenIds, common_prefix, segment_digest

TINY = Geometry(1, 1, 1, 1, torch.float32, (None,))


def ids(*tokens: int) -> TokenIds:
    return np.asarray(tokens, dtype=np.int32)


def add(store: SegmentStore, tokens: Sequence[int], parent: PathEntry | None = None, salt: str = "") -> Segment:
    kv = KvBuffer(TINY, len(tokens), torch.device("cpu"))
    kv.commit(len(tokens))
    return store.add(salt, parent, ids(*tokens), kv)


def full_tokens(segment: Segment) -> list[int]:
    """All tokens from position 0 to the segment's end, its ancestors' included."""
    before = full_tokens(segment.parent)[: segment.start] if segment.parent else []
    return [*before, *segment.token_ids.tolist()]


def tokens_of(path: Path) -> list[int]:
    return [t for entry in path for t in entry.segment.token_ids[: entry.limit].tolist()]


SALTS = ("", "tenant")
short_runs = st.lists(st.integers(0, 1), min_size=1, max_size=4)
plans = st.lists(st.tuples(st.integers(0, 99), st.integers(1, 4), short_runs, st.sampled_from(SALTS)), max_size=14)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(plan=plans, prompt=st.lists(st.integers(0, 1), max_size=12), salt=st.sampled_from(SALTS))
def test_longest_prefix_equals_brute_force_over_random_trees(
    plan: list[tuple[int, int, list[int], str]], prompt: list[int], salt: str
) -> None:
    store, made = SegmentStore(), list[Segment]()
    for choice, limit, tokens, segment_salt in plan:
        parents = [s for s in made if s.salt == segment_salt]
        parent = parents[choice % len(parents)] if parents and choice % 4 else None
        entry = PathEntry(parent, min(limit, parent.num_tokens)) if parent else None
        made.append(add(store, tokens, entry, segment_salt))
    path = store.longest_prefix(ids(*prompt), salt)
    best = max((common_prefix(ids(*full_tokens(s)), ids(*prompt)) for s in made if s.salt == salt), default=0)
    assert (path[-1].end if path else 0) == best
    assert tokens_of(path) == prompt[:best]
    assert all(entry.segment.salt == salt for entry in path)
    assert [e.segment.start for e in path] == [0, *(e.end for e in path)][: len(path)]
    assert [e.segment.parent for e in path[1:]] == [e.segment for e in path[:-1]]


def test_a_prefix_may_end_inside_a_segment() -> None:
    store = SegmentStore()
    segment = add(store, [1, 2, 3, 4])
    assert store.longest_prefix(ids(1, 2, 9), "") == (PathEntry(segment, 2),)
    assert store.longest_prefix(ids(9, 1, 2), "") == ()
    assert store.longest_prefix(ids(), "") == ()


def test_a_child_is_reached_past_the_middle_of_its_parent() -> None:
    store = SegmentStore()
    document = add(store, [1, 2, 3, 4])
    question = add(store, [7, 8], PathEntry(document, 2))
    assert store.longest_prefix(ids(1, 2, 7, 8, 9), "") == (PathEntry(document, 2), PathEntry(question, 2))
    assert store.longest_prefix(ids(1, 2, 3, 4, 7, 8), "") == (PathEntry(document, 4),)


def test_a_child_is_not_reached_when_its_parent_matches_too_little() -> None:
    store = SegmentStore()
    document = add(store, [1, 2, 3, 4])
    add(store, [5, 6], PathEntry(document, 4))
    assert store.longest_prefix(ids(1, 2, 5, 6), "") == (PathEntry(document, 2),)


def test_the_same_content_is_held_once() -> None:
    store = SegmentStore()
    first = add(store, [1, 2, 3])
    assert add(store, [1, 2, 3]) is first
    child = add(store, [4], PathEntry(first, 3))
    assert add(store, [4], PathEntry(first, 3)) is child
    assert (len(store), first.num_references) == (2, 1)
    assert store.get(first.digest) is first


def test_digest_depends_on_every_part_of_the_content() -> None:
    store = SegmentStore()
    parent = add(store, [1, 2, 3])
    digests = {
        segment_digest("", None, ids(4, 5)),
        segment_digest("", None, ids(5, 4)),
        segment_digest("", None, ids(4, 5, 0)),
        segment_digest("s", None, ids(4, 5)),
        segment_digest("", PathEntry(parent, 3), ids(4, 5)),
        segment_digest("", PathEntry(parent, 2), ids(4, 5)),
    }
    assert len(digests) == 6


def test_digest_does_not_depend_on_the_array_type() -> None:
    assert segment_digest("", None, ids(4, 5)) == segment_digest("", None, np.asarray([4, 5], dtype=np.int64))  # type: ignore[arg-type]


def test_digest_keeps_the_border_between_salt_and_tokens() -> None:
    assert segment_digest("a", None, ids(0, 7)) != segment_digest("a" + "\0" * 4, None, ids(7))


def test_digest_keeps_the_border_between_parent_and_tokens() -> None:
    parent = add(SegmentStore(), [1, 2, 3])
    as_tokens = np.frombuffer(parent.digest + (3).to_bytes(8, "little"), dtype="<i4")
    forged = np.concatenate([as_tokens, ids(4)]).astype(np.int32)
    assert segment_digest("", PathEntry(parent, 3), ids(4)) != segment_digest("", None, forged)


def test_salts_share_no_segments() -> None:
    store = SegmentStore()
    ours, theirs = add(store, [1, 2, 3], salt="ours"), add(store, [1, 2, 3], salt="theirs")
    assert ours is not theirs
    assert store.longest_prefix(ids(1, 2, 3), "ours") == (PathEntry(ours, 3),)
    assert store.longest_prefix(ids(1, 2, 3), "") == ()


def test_a_referenced_segment_cannot_be_removed() -> None:
    store = SegmentStore()
    parent = add(store, [1, 2])
    child = add(store, [3], PathEntry(parent, 2))
    with pytest.raises(AssertionError):
        store.remove(parent)
    store.remove(child)
    assert parent.num_references == 0
    store.remove(parent)
    assert len(store) == 0
    assert store.longest_prefix(ids(1, 2, 3), "") == ()


def test_a_removed_segment_can_be_added_again() -> None:
    store = SegmentStore()
    store.remove(add(store, [1, 2]))
    again = add(store, [1, 2])
    assert store.longest_prefix(ids(1, 2), "") == (PathEntry(again, 2),)


def test_store_may_be_emptied_while_it_is_iterated() -> None:
    store = SegmentStore()
    for first in range(5):
        add(store, [first])
    for segment in store:
        store.remove(segment)
    assert len(store) == 0


def test_drop_superseded_removes_earlier_turns_only() -> None:
    store = SegmentStore()
    turn_1, turn_2 = add(store, [1, 2]), add(store, [1, 2, 3, 4])
    other_chat, other_tenant = add(store, [1, 9]), add(store, [1, 2], salt="t")
    store.drop_superseded(turn_2)
    assert set(store) == {turn_2, other_chat, other_tenant}
    assert store.get(turn_1.digest) is None


@pytest.mark.parametrize("why", ["referenced", "building", "has a child"])
def test_drop_superseded_leaves_what_is_in_use(why: str) -> None:
    store = SegmentStore()
    earlier, later = add(store, [1, 2]), add(store, [1, 2, 3])
    if why == "referenced":
        earlier.num_references += 1
    elif why == "building":
        earlier.index_state = "building"
    else:
        add(store, [7], PathEntry(earlier, 2))
    store.drop_superseded(later)
    assert store.get(earlier.digest) is earlier


def test_drop_superseded_compares_only_children_of_one_position() -> None:
    store = SegmentStore()
    document = add(store, [1, 2, 3])
    inside = add(store, [4], PathEntry(document, 2))
    turn_1 = add(store, [4], PathEntry(document, 3))
    turn_2 = add(store, [4, 5], PathEntry(document, 3))
    store.drop_superseded(turn_2)
    assert set(store) == {document, inside, turn_2}
    assert turn_1 not in document.children
    assert document.num_references == 2


@given(a=st.lists(st.integers(0, 2), max_size=8), b=st.lists(st.integers(0, 2), max_size=8))
@settings(deadline=None, derandomize=True)
def test_common_prefix_counts_equal_leading_tokens(a: list[int], b: list[int]) -> None:
    n = common_prefix(ids(*a), ids(*b))
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]


def test_bytes_are_those_of_valid_tokens_and_the_index(world: Any) -> None:
    segment = world.context([10]).path[0].segment
    assert segment.kv_bytes == 10 * world.geometry.kv_bytes_per_token
    assert segment.index_bytes == 0
    segment.index = SimpleNamespace(begin=4, nbytes=77)
    assert segment.index_bytes == 77
