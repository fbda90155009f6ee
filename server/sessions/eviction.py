"""Evicts idle segments from host memory, to disk where there is one. What goes first is `policy`'s decision.

Engine thread only. Counts every eviction by its reason: `index` (of a segment that stays), `to_disk`, `unsaved` (the
write failed, or the disk had better use for its space) and `budget` (there is no disk, or it is not worth a file).
"""

from __future__ import annotations

import time

from retrieval.segments import Segment, SegmentStore
from server.engine.recorder import Recorder
from server.sessions import disk_tier
from server.sessions.disk_tier import DiskTier
from server.sessions.policy import Candidate, Victim, choose_victims, index_seconds, prefill_seconds, read_seconds


class Evictor:
    """Frees bytes of segments that no context, pin or thread holds."""

    def __init__(self, store: SegmentStore, tier: DiskTier | None, recorder: Recorder) -> None:
        self._store, self._tier, self._recorder = store, tier, recorder

    def evict(self, num_bytes: int, even_if_short: bool = False) -> bool:
        """Free so many bytes; False if that is not so (yet): what is not on disk is written first.

        When the idle segments cannot give that much, nothing is evicted unless `even_if_short`.
        """
        missing = num_bytes - (self._tier.spilling_bytes if self._tier is not None else 0)
        victims = choose_victims(self._candidates(), missing)
        if sum(victim.num_bytes for victim in victims) < missing and not even_if_short:
            return False
        return sum(map(self._evict_one, victims)) >= num_bytes

    def spilled(self, segment: Segment, is_saved: bool) -> None:
        """The write that eviction has waited for has ended; it may have failed, and memory is short all the same."""
        is_idle = segment.num_references == 0 and segment.index_state != "building"
        if is_idle and self._store.get(segment.digest) is segment:
            self._remove(segment, "to_disk" if is_saved else "unsaved")

    def _evict_one(self, victim: Victim) -> int:
        """Bytes freed now; 0 where that takes a write, or where what continues it has not gone yet."""
        segment = self._store.get(victim.key)
        if segment is None or (victim.part == "segment" and segment.num_references):
            return 0
        if victim.part == "index":
            segment.index, segment.index_state = None, "none"
            self._recorder.eviction("host", "index", victim.num_bytes)
        elif self._tier is None or not _is_worth_a_file(segment):
            self._remove(segment, "budget")
        elif self._tier.is_saved(segment.digest):
            self._remove(segment, "to_disk")
        else:
            self._tier.save(segment, is_spill=True)
            return 0
        return victim.num_bytes

    def _remove(self, segment: Segment, reason: str) -> None:
        self._store.remove(segment)
        self._recorder.eviction("host", reason, segment.kv_bytes + segment.index_bytes)

    def _candidates(self) -> list[Candidate]:
        """Segments that no context holds; those being indexed or written wait."""
        now = time.monotonic()
        return [
            self._candidate(s, now)
            for s in self._store
            if s.num_references == len(s.children) and s.index_state != "building" and not self._is_leaving(s)
        ]

    def _is_leaving(self, segment: Segment) -> bool:
        return self._tier is not None and self._tier.is_spilling(segment.digest)

    def _candidate(self, segment: Segment, now: float) -> Candidate:
        """Where there is a disk, K and V come back so fast that giving up an index first would save nothing."""
        num_bytes = segment.kv_bytes + segment.index_bytes
        is_computed = self._tier is None or not _is_worth_a_file(segment)
        prefill = prefill_seconds(segment.start, segment.num_tokens)
        return Candidate(
            key=segment.digest,
            parent=segment.parent.digest if segment.parent else None,
            num_bytes=num_bytes,
            restore_seconds=prefill if is_computed else read_seconds(num_bytes),
            idle_seconds=max(0.0, now - segment.last_used),
            num_references=len(segment.children),
            num_hits=segment.num_hits,
            index_bytes=segment.index_bytes if segment.index_state == "ready" else 0,
            index_seconds=index_seconds(segment.num_tokens),
        )


def _is_worth_a_file(segment: Segment) -> bool:
    return segment.num_tokens >= disk_tier.MIN_SAVED_TOKENS
