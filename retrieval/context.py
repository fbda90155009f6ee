"""A context: what one sequence attends to, a path of shared segments and its own growing tail.

Owns references to segments and the tail's memory; decides which positions are sink, retrieved set and
window. Engine thread only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from retrieval.geometry import Geometry
from retrieval.kv_buffer import KvBuffer
from retrieval.segment_index import OnlineCodes
from retrieval.segments import Path, PathEntry, PathHold, Segment, SegmentStore, TokenIds, path_to


@dataclass(frozen=True, slots=True)
class StaticSet:
    """Sizes of what every decode step attends to exactly, and when a tail is sealed."""

    num_sink_tokens: int = 128
    window_size: int = 512
    seal_tokens: int = 2048  # a segment is worth an index, and a prefix worth sharing, from this size on


@dataclass(frozen=True, slots=True)
class Run:
    """Positions `[begin, end)` of one buffer; with `indexed`, the segment whose index covers them."""

    kv: KvBuffer
    begin: int  # offset in the buffer
    end: int
    indexed: Segment | None = None


class Context:
    """A path of segments plus the tail; `close` must be called to let the segments go."""

    def __init__(
        self,
        geometry: Geometry,
        static: StaticSet,
        store: SegmentStore,
        path: Path,
        tail: KvBuffer,
        salt: str,
        device: torch.device,
    ) -> None:
        self.geometry = geometry
        self.static = static
        self.tail = tail
        self.salt = salt
        self.device = device  # where the model computes, and the tail lives once the prompt is sealed
        self.num_expected_tokens = 0  # length of the prompt to be read; set by open_context
        self.method_state: Any = None  # owned by the attention method
        self.decode_cache: Any = None  # owned by the decoder
        self.online_codes: OnlineCodes | None = None  # of the tail while the prompt is read; set by the builder
        self.query_sample: Any = None  # owned by the prefill attention, read by the index builder
        self._store = store
        self._hold = PathHold(store, path)
        self._closed = False

    @property
    def path(self) -> Path:
        """The shared part, from position 0; its segments may be replaced by merged ones between two steps."""
        return self._hold.path

    @property
    def tail_start(self) -> int:
        """Absolute position of the tail's first token."""
        return self.path[-1].end if self.path else 0

    @property
    def num_tokens(self) -> int:
        """Tokens whose K and V are held in all layers."""
        return self.tail_start + self.tail.length

    @property
    def tail_bytes(self) -> int:
        """Bytes of K and V that only this context holds."""
        return self.tail.nbytes

    @property
    def staging_bytes(self) -> int:
        """Bytes of what only this context holds beside its tail: codes in the making, sampled queries, kept keys."""
        held = (self.online_codes, self.query_sample, self.method_state)
        return sum(int(part.nbytes) for part in held if part is not None)

    def runs(self, num_new: int = 0) -> list[Run]:
        """All positions, in order, as whole runs; `num_new` uncommitted tokens of the tail included."""
        runs = [Run(e.segment.kv, 0, e.limit) for e in self.path]
        return [*runs, Run(self.tail, 0, self.tail.length + num_new)]

    def decode_runs(self, num_new: int) -> list[Run]:
        """Disjoint runs covering every position once: sink and window exact, indexed middles marked.

        The window is the last `window_size` positions. A segment without an index yet is one exact run.
        """
        window_begin = self.num_tokens + num_new - self.static.window_size
        runs: list[Run] = []
        for entry in self.path:
            runs += self._segment_runs(entry, window_begin)
        runs.append(Run(self.tail, 0, self.tail.length + num_new))
        return runs

    def _segment_runs(self, entry: PathEntry, window_begin: int) -> list[Run]:
        segment, limit = entry.segment, entry.limit
        if segment.index is None:
            return [Run(segment.kv, 0, limit)]
        begin = min(segment.index.begin, limit)
        middle = min(max(window_begin - segment.start, begin), limit)
        pieces = [Run(segment.kv, 0, begin), Run(segment.kv, begin, middle, segment), Run(segment.kv, middle, limit)]
        return [piece for piece in pieces if piece.end > piece.begin]

    def seal(self, token_ids: TokenIds, num_kept: int = 0) -> Segment:
        """Turn the tail but its newest `num_kept` tokens into a segment of the store.

        token_ids: all tokens of the context. Returns the new last segment of the path, which may be one
        of the same content that was held already.
        """
        num_sealed = self.tail.length - num_kept
        assert num_sealed > 0
        parent = self.path[-1] if self.path else None
        start = self.tail_start
        run = np.asarray(token_ids[start : start + num_sealed], dtype=np.int32).copy()
        tail, self.tail = self.tail, self._new_tail(num_kept)
        self.tail.copy_range(tail, num_sealed, num_sealed + num_kept)
        tail.length = num_sealed
        segment = self._store.add(self.salt, parent, run, tail.sealed())
        self._hold.move(path_to(PathEntry(segment, num_sealed)))  # not always the old path: the content may be known
        return segment

    def _new_tail(self, num_kept: int) -> KvBuffer:
        return KvBuffer(self.geometry, num_kept + 256, self.device)

    def fork(self) -> Context:
        """A second context over the same tokens: segments shared, the tail copied."""
        tail = KvBuffer(self.geometry, self.tail.length + 256, self.tail.device)
        tail.copy_range(self.tail, 0, self.tail.length)
        twin = Context(self.geometry, self.static, self._store, self.path, tail, self.salt, self.device)
        twin.method_state, twin.query_sample = self.method_state, self.query_sample
        return twin

    def close(self) -> None:
        """Let the segments go and drop the tail; idempotent."""
        if self._closed:
            return
        self._closed = True
        self._hold.release()
        self.decode_cache = None
        self.tail = KvBuffer(self.geometry, 1, torch.device("cpu"))


def open_context(
    geometry: Geometry,
    static: StaticSet,
    store: SegmentStore,
    token_ids: TokenIds,
    *,
    salt: str,
    capacity: int,
    device: torch.device,
    reuse: bool = True,
) -> Context:
    """A context holding the longest stored prefix of `token_ids[:-1]` (the last token is always computed).

    Segments of which `seal_tokens` or more are used are shared; a shorter rest is copied into the tail,
    so a path holds only long segments. `capacity`: tokens the whole context may reach. A tail that will be
    sealed soon is kept in (pinned) host memory, so that device memory stays bounded whatever the length.
    """
    found = store.longest_prefix(token_ids[:-1], salt) if reuse else ()
    num_shared = next((i for i, e in enumerate(found) if e.limit < static.seal_tokens), len(found))
    shared, copied = found[:num_shared], found[num_shared:]
    start = shared[-1].end if shared else 0
    is_long = len(token_ids) - start > static.window_size + static.seal_tokens
    tail_device = torch.device("cpu") if is_long else device
    tail = KvBuffer(geometry, capacity - start, tail_device, pin=is_long and device.type == "cuda")
    context = Context(geometry, static, store, shared, tail, salt, device)
    context.num_expected_tokens = len(token_ids)
    for entry in copied:
        tail.copy_range(entry.segment.kv, 0, entry.limit)
    for entry in found:
        entry.segment.num_hits += 1
    return context
