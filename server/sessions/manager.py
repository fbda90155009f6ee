"""Opens, seals and closes contexts under one byte budget, and evicts idle segments to keep it.

Owns the segment store, the index builder and the budget. Engine thread only; builds run on the builder's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Set
from dataclasses import dataclass

import numpy as np
import torch

from retrieval.builder import IndexBuilder
from retrieval.compaction import Compactor
from retrieval.context import Context, StaticSet, open_context
from retrieval.geometry import Geometry
from retrieval.methods.retrieval import QuerySample
from retrieval.segment_index import OnlineCodes
from retrieval.segments import Path, PathHold, Segment, SegmentStore, TokenIds
from server.engine.recorder import Recorder
from server.errors import DiskUnavailableError
from server.sessions.budget import Budget
from server.sessions.catalogue import Extension
from server.sessions.disk import Disk, DiskStats
from server.sessions.disk_tier import DiskTier
from server.sessions.eviction import Evictor
from server.sessions.policy import prefill_seconds, read_seconds

logger = logging.getLogger(__name__)

MIN_KEPT_TOKENS = 16  # an ended context shorter than this is not worth a segment


@dataclass(frozen=True, slots=True)
class ManagerStats:
    """What is held now."""

    num_segments: int
    kv_bytes: int
    index_bytes: int
    reserved_bytes: int
    limit_bytes: int


class SessionManager:
    """Contexts in, contexts out; everything between is accounted for."""

    def __init__(
        self,
        geometry: Geometry,
        static: StaticSet,
        builder: IndexBuilder | None,
        budget: Budget,
        recorder: Recorder,
        *,
        device: torch.device,
        prefix_caching: bool = True,
        compacts: bool = True,
        disk: Disk | None = None,
    ) -> None:
        """compacts: merge the segments of a growing context; off for indexes that cannot be built without a prompt."""
        self.store = SegmentStore()
        self.budget = budget
        self.num_changes = 0  # grows whenever memory may have become free
        self._geometry, self._static, self._builder = geometry, static, builder
        self._recorder, self._device, self._prefix_caching = recorder, device, prefix_caching
        self._compactor = self._make_compactor() if compacts else None
        self._pins: set[PathHold] = set()  # their paths follow when segments are replaced
        self._tier = DiskTier(disk, self.store, self.release, self._spilled, self._index) if disk is not None else None
        self._evictor = Evictor(self.store, self._tier, recorder)

    def _make_compactor(self) -> Compactor:
        index_of = self._builder.merged if self._builder is not None else None
        on_compacted = self._recorder.compaction
        return Compactor(
            self.store, self._static.seal_tokens, self._reserve_tokens, self.release, on_compacted, index_of
        )

    def _reserve_tokens(self, num_tokens: int) -> int | None:
        num_bytes = self.worst_case_bytes(num_tokens)
        return num_bytes if self.reserve(num_bytes) else None

    def _spilled(self, segment: Segment, is_saved: bool) -> None:
        self.num_changes += 1
        self._evictor.spilled(segment, is_saved)

    def settle(self) -> None:
        """Take over what background threads have finished. Between two steps only."""
        if self._compactor is not None:
            self._compactor.settle()
        if self._tier is not None:
            self._tier.settle()

    @property
    def max_copied_tokens(self) -> int:
        """Tokens that a fork may have to copy: the longest tail there is before it is sealed."""
        return self._static.window_size + self._static.seal_tokens

    def worst_case_bytes(self, num_tokens: int, num_decoded: int = 0) -> int:
        """K, V and indexes of `num_tokens` that share nothing, the last `num_decoded` of them not from the prompt.

        The prompt is sealed at once, unless it is too short, and what is decoded behind it piece by piece.
        """
        if self._builder is None:
            return self.kv_bytes(num_tokens)
        each, num_prompt = self._static.seal_tokens, num_tokens - num_decoded
        if num_prompt < each:
            num_prompt, num_decoded = 0, num_tokens
        index_bytes = num_decoded // each * self._builder.most_bytes(self._geometry, each, was_decoded=True)
        if num_prompt:
            index_bytes += self._builder.most_bytes(self._geometry, num_prompt)
        return self.kv_bytes(num_tokens) + index_bytes

    def kv_bytes(self, num_tokens: int) -> int:
        """K and V of that many tokens."""
        return num_tokens * self._geometry.kv_bytes_per_token

    def reserve(self, num_bytes: int) -> bool:
        """Take `num_bytes` of the budget, evicting idle segments if it must and if that is enough; False: not now."""
        shortfall = self.budget.shortfall(num_bytes, self.held_bytes())
        if shortfall and not self._evictor.evict(shortfall):
            return False
        self.budget.reserve(num_bytes)
        self._evict_excess()
        return True

    def release(self, num_bytes: int) -> None:
        """Give a reservation back, and evict what the segments now hold too much."""
        self.num_changes += 1
        self.budget.release(num_bytes)
        self._evict_excess()

    def _evict_excess(self) -> None:
        excess = self.budget.excess(self.held_bytes())
        if excess:
            self._evictor.evict(excess, even_if_short=True)

    def held_bytes(self) -> int:
        """Bytes of all segments, indexes included, and of those that only a write to disk still holds."""
        return self.staging_bytes + sum(s.kv_bytes + s.index_bytes for s in self.store)

    def open(self, token_ids: list[int], salt: str, max_tokens: int, reuse: bool = True) -> Context:
        """A context with the longest stored prefix of the prompt, or nothing; `max_tokens` it may grow to."""
        ids = np.asarray(token_ids, dtype=np.int32)
        context = open_context(
            self._geometry,
            self._static,
            self.store,
            ids,
            salt=salt,
            capacity=max_tokens,
            device=self._device,
            reuse=reuse and self._prefix_caching,
        )
        for entry in context.path:
            entry.segment.last_used = time.monotonic()
            self._index(entry.segment)
        if self._tier is not None:
            self._tier.used(context.path)
        num_unread = len(token_ids) - context.tail_start
        if self._builder is not None and num_unread >= self._static.seal_tokens:
            self._builder.watch(context)
        return context

    def prompt_done(self, context: Context, token_ids: list[int]) -> int:
        """Seal the prompt just read, if it is long enough to be worth an index.

        Returns the tokens that are now held by a segment and no longer by the request's reservation.
        """
        if context.tail.length < self._static.seal_tokens:
            return 0
        return self._seal(context, token_ids, num_kept=0).num_tokens

    def grown(self, context: Context, token_ids: list[int]) -> int:
        """Seal the old part of a tail that has outgrown window and seal size; returns as `prompt_done`."""
        if context.tail.length < self._static.window_size + self._static.seal_tokens:
            return 0
        return self._seal(context, token_ids, num_kept=self._static.window_size).num_tokens

    def close(self, context: Context, token_ids: list[int]) -> None:
        """End a context; what it holds stays as segments for later requests."""
        if self._prefix_caching and context.tail.length >= MIN_KEPT_TOKENS:
            self._seal(context, token_ids, num_kept=0)
        self.drop(context)

    def drop(self, context: Context) -> None:
        """End a context of which nothing more is kept than was sealed; without prefix caching, not even that."""
        context.close()
        if not self._prefix_caching:
            self._remove_idle()

    @property
    def num_pending(self) -> int:
        """Whatever background threads work on that memory or requests may wait for."""
        return self.num_pending_builds + (self._tier.num_pending if self._tier is not None else 0)

    @property
    def is_settling(self) -> bool:
        """Whether background threads will have results to take over."""
        return self.num_pending_builds > 0 or (self._tier is not None and self._tier.is_busy)

    @property
    def num_pending_builds(self) -> int:
        """Segments waiting for their index, being indexed or being merged."""
        num_merges = self._compactor.num_pending if self._compactor is not None else 0
        return sum(s.index_state == "building" for s in self.store) + num_merges

    # --- what is kept on purpose ----------------------------------------------------------------------

    def pin(self, path: Path) -> PathHold:
        """Keep the segments of a path in memory until the `unpin` of what is returned; they count as referenced."""
        hold = PathHold(self.store, path)
        self._pins.add(hold)
        return hold

    def unpin(self, hold: PathHold) -> None:
        """Undo a `pin`."""
        self._pins.remove(hold)
        hold.release()
        self.num_changes += 1

    @property
    def pinned_bytes(self) -> int:
        """Bytes of pinned segments, indexes included."""
        pinned = {e.segment for hold in self._pins for e in hold.path}
        return sum(s.kv_bytes + s.index_bytes for s in pinned)

    def discard(self, segments: Iterable[Segment], needed: Set[bytes]) -> int:
        """Forget segments and what continues them, but for what is held, being indexed, or `needed` (digests).

        Returns the bytes freed.
        """
        found, num_bytes = list(segments), 0
        for segment in found:  # grows: children come after their parents
            found += [child for child in segment.children if child not in found]
        for segment in reversed(found):
            is_idle = segment.num_references == 0 and segment.index_state != "building"
            if is_idle and segment.digest not in needed and self.store.get(segment.digest) is segment:
                self.store.remove(segment)
                num_bytes += segment.kv_bytes + segment.index_bytes
                if self._tier is not None:
                    self._tier.forget(segment.digest)
        self.num_changes += 1
        return num_bytes

    def persist(self, path: Path) -> None:
        """Queue the segments of a path for writing to disk, to be kept there until they are forgotten.

        Raises `DiskUnavailableError` where there is no disk tier.
        """
        if self._tier is None:
            raise DiskUnavailableError("this server keeps nothing on disk: start it with --kv-disk-path")
        for entry in path:
            self._tier.save(entry.segment, is_kept=True)

    def is_persisted(self, segment: Segment) -> bool:
        """Whether the segment's K and V are safely on disk."""
        return self._tier is not None and self._tier.is_saved(segment.digest)

    def is_persisting(self, path: Path) -> bool:
        """Whether any of a path's segments is being written to disk."""
        return self._tier is not None and any(self._tier.is_saving(entry.segment.digest) for entry in path)

    def num_tokens_saved(self, token_ids: TokenIds, salt: str) -> int:
        """Length of the longest prefix that the disk alone can give back."""
        chain = self._tier.disk.catalogue.longer_than(0, token_ids, salt) if self._tier is not None else []
        return chain[-1].end if chain else 0

    def give_up(self, token_ids: TokenIds, salt: str, others: Iterable[tuple[TokenIds, str]], *, deletes: bool) -> int:
        """Undo the `persist` of a context, but for what `others` (token ids, salt) need.

        Its files are deleted at once, or left to the quota. Returns the bytes freed.
        """
        if self._tier is None:
            return 0
        disk, num_bytes = self._tier.disk, 0
        needed = {e.record.digest for ids, other_salt in others for e in disk.catalogue.serving(ids, other_salt)}
        for entry in disk.catalogue.serving(token_ids, salt):
            digest, run = entry.record.digest, token_ids[entry.record.start : entry.record.end]
            if digest in needed or not np.array_equal(entry.record.token_ids, run):
                continue
            disk.keep(digest, False)
            num_bytes += disk.remove(digest, "deleted") if deletes else 0
        return num_bytes

    # --- what comes back from disk --------------------------------------------------------------------

    def prepare(self, token_ids: list[int], salt: str, *, at_any_cost: bool = False) -> bool:
        """Have what the disk holds of a prompt read into memory; False: under way, or no memory for it now.

        When this is True, `open` finds all that can be found, and (unless `at_any_cost`) is worth being read.
        """
        if self._tier is None or not self._prefix_caching:
            return True
        ids = np.asarray(token_ids[:-1], dtype=np.int32)  # the last token is always computed
        found = self._tier.missing(ids, salt)
        entries = [extension.entry for extension in (found if at_any_cost else _worth_reading(found))]
        if not entries:
            return True
        if self._tier.is_loading(entries):
            return False
        num_bytes = sum(self.worst_case_bytes(len(e.record.token_ids)) for e in entries)
        if num_bytes + self.pinned_bytes > self.budget.limit_bytes:
            return True  # it would never fit: computing the part that is wanted may
        hold = PathHold(self.store, self.store.longest_prefix(ids, salt))
        is_reserved = self.reserve(num_bytes)
        if is_reserved:
            self._tier.load(entries, ids, salt, num_bytes)
        hold.release()
        return False

    @property
    def disk_bytes(self) -> int:
        """Bytes held on disk."""
        stats = self.disk_stats
        return stats.kv_bytes + stats.index_bytes

    @property
    def has_disk(self) -> bool:
        """Whether there is a disk tier."""
        return self._tier is not None

    @property
    def staging_bytes(self) -> int:
        """Bytes of host memory that only a write to disk still holds."""
        return self._tier.staging_bytes if self._tier is not None else 0

    @property
    def background_bytes(self) -> int:
        """Bytes of what background threads are making; reserved, and no segment's yet."""
        builders = (part for part in (self._builder, self._compactor) if part is not None)
        loading = self._tier.loading_bytes if self._tier is not None else 0
        return loading + sum(part.staging_bytes for part in builders)

    @property
    def disk_stats(self) -> DiskStats:
        """What is held on disk; nothing where there is none."""
        return self._tier.disk.stats() if self._tier is not None else DiskStats()

    def disk_bytes_of(self, contexts: Iterable[tuple[TokenIds, str]]) -> int:
        """Bytes on disk that serve some contexts (token ids, salt), each file once."""
        if self._tier is None:
            return 0
        found = {e.record.digest: e for ids, salt in contexts for e in self._tier.disk.catalogue.serving(ids, salt)}
        return sum(entry.num_bytes for entry in found.values())

    def num_tokens_on_disk(self, token_ids: TokenIds, salt: str) -> int:
        """Length of the longest prefix that disk and memory together can give back; cheap, reads no K or V."""
        path = self.store.longest_prefix(token_ids, salt)
        found = self._tier.missing(token_ids, salt) if self._tier is not None else []
        if found:
            return found[-1].end
        return path[-1].end if path else 0

    def stats(self) -> ManagerStats:
        """Figures for metrics."""
        segments = list(self.store)
        return ManagerStats(
            num_segments=len(segments),
            kv_bytes=sum(s.kv_bytes for s in segments),
            index_bytes=sum(s.index_bytes for s in segments),
            reserved_bytes=self.budget.reserved_bytes,
            limit_bytes=self.budget.limit_bytes,
        )

    def wait_for_indexes(self) -> None:
        """Block until every submitted index is built."""
        if self._builder is not None:
            self._builder.wait()
        if self._compactor is not None:
            self.settle()
            self._compactor.wait()
            self.settle()

    def shutdown(self) -> None:
        """Stop building."""
        if self._compactor is not None:
            self._compactor.close()
        if self._builder is not None:
            self._builder.close()
        if self._tier is not None:
            self._tier.close()

    def _seal(self, context: Context, token_ids: list[int], num_kept: int) -> Segment:
        segment = context.seal(np.asarray(token_ids, dtype=np.int32), num_kept)
        segment.last_used = time.monotonic()
        self.store.drop_superseded(segment)
        self._index(segment, context.query_sample, context.online_codes)
        context.query_sample = context.online_codes = None
        if self._compactor is not None:
            self._compactor.consider(segment)
        return segment

    def _remove_idle(self) -> None:
        """Forget what no context holds, children before their parents."""
        while idle := [s for s in self.store if s.num_references == 0 and s.index_state != "building"]:
            for segment in idle:
                self.store.remove(segment)

    def _index(self, segment: Segment, sample: QuerySample | None = None, online: OnlineCodes | None = None) -> None:
        if self._builder is not None and segment.num_tokens >= self._static.seal_tokens:
            self._builder.submit(segment, sample, online)


def _worth_reading(chain: list[Extension]) -> list[Extension]:
    """As much of it as takes less time to read than its tokens to compute."""
    for num_read in range(len(chain), 0, -1):
        reading = sum(read_seconds(extension.entry.num_bytes) for extension in chain[:num_read])
        if reading < sum(prefill_seconds(e.begin, e.end - e.begin) for e in chain[:num_read]):
            return chain[:num_read]
    return []
