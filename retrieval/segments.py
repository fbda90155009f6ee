"""Segments: immutable, content-addressed runs of a context's K and V, shared by reference count.

Owns which segments exist, who refers to them and how a prompt finds its longest cached prefix. What refers to
segments for longer than a call does so by a `PathHold`, since a chain of segments may be replaced by one. Knows
nothing of how an index works (it holds one as an opaque object with `begin` and `nbytes`) nor of budgets. All
calls come from the engine thread, except that an index build may set `Segment.index` from its own thread.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from retrieval.kv_buffer import KvBuffer

TokenIds = npt.NDArray[np.int32]


@dataclass(eq=False, slots=True)
class Segment:
    """K and V of all layers for `token_ids`, positions `[start, start + num_tokens)` of its context."""

    digest: bytes  # of salt, start and all token ids up to the end
    parent: Segment | None
    parent_limit: int  # tokens of the parent's run that precede this one
    start: int  # absolute position of the first token
    token_ids: TokenIds
    kv: KvBuffer
    salt: str
    index: Any = None  # set once by the builder; None: attended exactly
    index_state: str = "none"  # none, building, ready, failed
    num_references: int = 0  # contexts and children that hold it
    num_hits: int = 0
    last_used: float = field(default_factory=time.monotonic)
    children: list[Segment] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens held."""
        return len(self.token_ids)

    @property
    def end(self) -> int:
        """Absolute position after the last token."""
        return self.start + self.num_tokens

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V."""
        return self.kv.nbytes

    @property
    def index_bytes(self) -> int:
        """Bytes of the indexes, 0 while there are none."""
        return 0 if self.index is None else int(self.index.nbytes)


@dataclass(frozen=True, slots=True)
class PathEntry:
    """The first `limit` tokens of a segment, as one step of a context's path."""

    segment: Segment
    limit: int

    @property
    def end(self) -> int:
        """Absolute position after the last visible token."""
        return self.segment.start + self.limit


Path = tuple[PathEntry, ...]


def segment_digest(salt: str, parent: PathEntry | None, token_ids: TokenIds) -> bytes:
    """Content address of a segment: BLAKE2b over salt, first position and all token ids from 0 to its end.

    How the tokens before it are cut into segments does not matter, so it stays what it is when those are merged,
    evicted or read from files. Every part has a fixed or a stated length, so that no salt can be chosen to collide
    with another tenant's.
    """
    digest = hashlib.blake2b(digest_size=20)
    encoded = salt.encode()
    digest.update(len(encoded).to_bytes(8, "little") + encoded)
    digest.update((parent.end if parent else 0).to_bytes(8, "little"))
    for entry in path_to(parent):
        digest.update(entry.segment.token_ids[: entry.limit].astype("<i4").tobytes())
    digest.update(token_ids.astype("<i4").tobytes())
    return digest.digest()


def path_to(last: PathEntry | None) -> Path:
    """The path from position 0 that ends with that entry."""
    path: list[PathEntry] = []
    while last is not None:
        path.append(last)
        segment = last.segment
        last = PathEntry(segment.parent, segment.parent_limit) if segment.parent else None
    return tuple(reversed(path))


def common_prefix(a: TokenIds, b: TokenIds) -> int:
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


class PathHold:
    """References to the segments of a path, from position 0 or not, until `release`.

    The store rewrites `path` when it replaces segments; the positions covered stay the same.
    """

    def __init__(self, store: SegmentStore, path: Path) -> None:
        self.path: Path = ()
        self._store = store
        self.move(path)

    def move(self, path: Path) -> None:
        """Hold another path instead."""
        for entry in path:
            entry.segment.num_references += 1
        for entry in self.path:
            entry.segment.num_references -= 1
        self.path = path
        (self._store.holds.add if path else self._store.holds.discard)(self)

    def release(self) -> None:
        """Let the segments go; idempotent."""
        self.move(())


class SegmentStore:
    """All segments in host memory, found by content."""

    def __init__(self) -> None:
        self._by_digest: dict[bytes, Segment] = {}
        self._roots: list[Segment] = []
        self.holds: set[PathHold] = set()  # of all paths that are held; kept by the holds themselves

    def __len__(self) -> int:
        return len(self._by_digest)

    def __iter__(self) -> Iterator[Segment]:
        return iter(list(self._by_digest.values()))

    def get(self, digest: bytes) -> Segment | None:
        """The segment of that content, if held."""
        return self._by_digest.get(digest)

    def add(self, salt: str, parent: PathEntry | None, token_ids: TokenIds, kv: KvBuffer) -> Segment:
        """Hold a new segment; one of the same content that is held already is returned instead."""
        digest = segment_digest(salt, parent, token_ids)
        known = self._by_digest.get(digest)
        if known is not None:
            return known
        start, limit = (parent.end, parent.limit) if parent else (0, 0)
        segment = Segment(digest, None, 0, start, token_ids, kv, salt)
        self._by_digest[digest] = segment
        self._attach(segment, parent.segment if parent else None, limit)
        return segment

    def remove(self, segment: Segment) -> None:
        """Forget a segment that nothing refers to."""
        assert segment.num_references == 0, "a referenced segment cannot be removed"
        del self._by_digest[segment.digest]
        self._detach(segment)

    def _attach(self, segment: Segment, parent: Segment | None, limit: int) -> None:
        segment.parent, segment.parent_limit = parent, limit
        (parent.children if parent else self._roots).append(segment)
        if parent:
            parent.num_references += 1

    def _detach(self, segment: Segment) -> None:
        (segment.parent.children if segment.parent else self._roots).remove(segment)
        if segment.parent:
            segment.parent.num_references -= 1

    def replace(self, chain: Sequence[Segment], kv: KvBuffer, index: Any = None) -> Segment:
        """Put one segment in the place of a chain, each of whose segments follows the whole of the one before.

        kv, index: of all the chain's tokens. Children and holds go over to the new segment; those of the chain that
        nothing else refers to are forgotten. Returns the new segment, or one of the same content held already.
        """
        first = chain[0]
        above = PathEntry(first.parent, first.parent_limit) if first.parent else None
        merged = self.add(first.salt, above, np.concatenate([s.token_ids for s in chain]), kv)
        if merged.kv is kv:
            merged.index, merged.index_state = index, "none" if index is None else "ready"
        merged.num_hits = max(merged.num_hits, *(s.num_hits for s in chain))
        merged.last_used = max(merged.last_used, *(s.last_used for s in chain))
        members = set(map(id, chain))
        for segment in chain:
            for child in [c for c in segment.children if id(c) not in members]:
                self._detach(child)
                self._attach(child, merged, segment.start - first.start + child.parent_limit)
        for hold in list(self.holds):
            hold.move(_replaced(hold.path, members, merged))
        for segment in reversed(chain):
            if segment.num_references == 0:
                self.remove(segment)
        return merged

    def drop_superseded(self, segment: Segment) -> None:
        """Remove idle siblings whose tokens are a prefix of `segment`'s: earlier turns of the same chat."""
        for sibling in list(segment.parent.children if segment.parent else self._roots):
            is_shorter = sibling is not segment and sibling.num_tokens < segment.num_tokens
            if not is_shorter or sibling.num_references or sibling.index_state == "building":
                continue
            if (sibling.salt, sibling.parent_limit) != (segment.salt, segment.parent_limit):
                continue
            if common_prefix(sibling.token_ids, segment.token_ids) == sibling.num_tokens:
                self.remove(sibling)

    def longest_prefix(self, token_ids: TokenIds, salt: str) -> Path:
        """The path that covers the longest prefix of `token_ids` among segments of that salt."""
        return self._longest(self._roots, None, token_ids, salt)

    def _longest(self, siblings: list[Segment], above: int | None, token_ids: TokenIds, salt: str) -> Path:
        """Best path through `siblings`, whose parent matched its first `above` tokens (None: no parent)."""
        best: Path = ()
        for segment in siblings:
            if segment.salt != salt or (above is not None and segment.parent_limit > above):
                continue
            matched = common_prefix(segment.token_ids, token_ids[segment.start :])
            if matched == 0:
                continue
            path: Path = (PathEntry(segment, matched),)
            deeper = self._longest(segment.children, matched, token_ids, salt)
            if deeper and deeper[-1].end > path[-1].end:
                path = (PathEntry(segment, deeper[0].segment.parent_limit), *deeper)
            if not best or path[-1].end > best[-1].end:
                best = path
        return best


def _replaced(path: Path, members: set[int], merged: Segment) -> Path:
    """The path with its run of entries of replaced segments, where there is one, as one entry of `merged`."""
    ends = [entry.end for entry in path if id(entry.segment) in members]
    if not ends:
        return path
    before = [entry for entry in path if entry.end <= merged.start]
    after = [entry for entry in path if entry.segment.start >= ends[-1]]
    return (*before, PathEntry(merged, ends[-1] - merged.start), *after)
