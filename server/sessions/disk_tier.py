"""Moves segments between host memory and disk, beside the engine's work.

Owns what is under way: writes, one after the other on one thread, and reads on another. Everything else happens on
the engine thread, which takes results over in `settle`, between two steps. Bytes that only a write still holds
are counted here until it has ended.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np

from retrieval.segment_file import PrefixDigests, SegmentRecord
from retrieval.segments import Path, PathEntry, PathHold, Segment, SegmentStore, TokenIds, path_to, segment_digest
from server.sessions.catalogue import DiskEntry, Extension
from server.sessions.disk import Disk, Outgoing, Stored

logger = logging.getLogger(__name__)

MIN_SAVED_TOKENS = 256  # shorter segments are read again in less time than a file is worth
FLUSH_SECONDS = 20.0  # at the end of the server, within Kubernetes' 30 seconds of grace


@dataclass(slots=True)
class _Save:
    """A write under way. `is_spill`: memory is to be freed when it has ended; `is_deleted`: the file is to go then."""

    segment: Segment
    result: Future[bool]
    is_spill: bool = False
    is_kept: bool = False
    is_deleted: bool = False


@dataclass(frozen=True, slots=True)
class _Load:
    """A read under way; its hold keeps the prefix that it continues."""

    digests: tuple[bytes, ...]
    token_ids: TokenIds
    salt: str
    hold: PathHold
    num_bytes: int  # reserved
    kv_bytes: int
    result: Future[list[Stored]]


class DiskTier:
    """The disk as the manager uses it."""

    def __init__(
        self,
        disk: Disk,
        store: SegmentStore,
        release: Callable[[int], None],
        on_spilled: Callable[[Segment, bool], None],
        on_loaded: Callable[[Segment], None],
    ) -> None:
        """release: gives a reservation back, and says that memory is free. on_spilled: a segment may leave memory;
        False: unsaved. on_loaded: one has come.
        """
        self.disk, self._store = disk, store
        self._release, self._on_spilled, self._on_loaded = release, on_spilled, on_loaded
        self._saves: dict[bytes, _Save] = {}
        self._loads: list[_Load] = []
        self._is_closed = False
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kv-disk-write")
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kv-disk-read")

    @property
    def num_pending(self) -> int:
        """Loads, and writes that memory waits for."""
        return len(self._loads) + sum(save.is_spill or self._is_staged(save) for save in self._saves.values())

    @property
    def is_busy(self) -> bool:
        """Whether anything is under way."""
        return bool(self._loads or self._saves)

    @property
    def spilling_bytes(self) -> int:
        """Bytes of memory that will be free when the writes under way have ended."""
        return sum(_bytes(save.segment) for save in self._saves.values() if save.is_spill)

    @property
    def staging_bytes(self) -> int:
        """Bytes that only a write still holds: their segments have been merged or forgotten meanwhile."""
        return sum(_bytes(save.segment) for save in self._saves.values() if self._is_staged(save))

    def _is_staged(self, save: _Save) -> bool:
        return self._store.get(save.segment.digest) is not save.segment

    @property
    def loading_bytes(self) -> int:
        """Bytes that reads fill, or have filled, before `settle` makes segments of them; at most, and reserved."""
        return sum(load.kv_bytes for load in self._loads)

    # --- writing --------------------------------------------------------------------------------------

    def is_spilling(self, digest: bytes) -> bool:
        """Whether the segment leaves memory when its write ends."""
        return digest in self._saves and self._saves[digest].is_spill

    def is_saving(self, digest: bytes) -> bool:
        """Whether the segment is being written."""
        return digest in self._saves

    def is_saved(self, digest: bytes) -> bool:
        """Whether K and V are safely on disk."""
        return self.disk.catalogue.get(digest) is not None

    def used(self, path: Path) -> None:
        """A request found these: what is used again is worth a write, before the server has to end."""
        for entry in path:
            self.disk.touch(entry.segment.digest)
            if entry.segment.num_hits:
                self.save(entry.segment)

    def save(self, segment: Segment, *, is_spill: bool = False, is_kept: bool = False) -> None:
        """Write a segment, and its index, where either is missing on disk."""
        save = self._saves.get(segment.digest)
        if save is None and is_kept:
            self.disk.keep(segment.digest, True)
        if save is None and (is_spill or is_kept or segment.num_tokens >= MIN_SAVED_TOKENS) and self._lacks(segment):
            save = self._saves[segment.digest] = _Save(segment, self._submit(segment, is_kept))
        if save is not None:
            save.is_spill, save.is_kept = save.is_spill or is_spill, save.is_kept or is_kept
            save.is_deleted = False

    def forget(self, digest: bytes) -> None:
        """Let no file come of a write under way, unless there was one before."""
        save = self._saves.get(digest)
        if save is not None and self.disk.catalogue.get(digest) is None:
            save.is_kept, save.is_deleted = False, True

    def _lacks(self, segment: Segment) -> bool:
        entry = self.disk.catalogue.get(segment.digest)
        return entry is None or (segment.index is not None and not entry.index_bytes and self.disk.keeps_indexes)

    def _submit(self, segment: Segment, is_kept: bool) -> Future[bool]:
        above = PathEntry(segment.parent, segment.parent_limit) if segment.parent else None
        context_ids = np.concatenate([*[e.segment.token_ids[: e.limit] for e in path_to(above)], segment.token_ids])
        last_used = time.time() - (time.monotonic() - segment.last_used)
        return self._writer.submit(self._write, segment, context_ids, last_used, is_kept)

    def _write(self, segment: Segment, context_ids: TokenIds, last_used: float, is_kept: bool) -> bool:
        """On the writer's thread."""
        prefix = PrefixDigests(segment.salt, context_ids).at(segment.start)
        record = SegmentRecord(segment.digest, segment.start, prefix, segment.token_ids)
        index, hits = segment.index, segment.num_hits
        try:
            return self.disk.write(
                Outgoing(record, segment.kv, index, segment.salt, context_ids, last_used, hits, is_kept)
            )
        except Exception:
            logger.exception("a segment could not be written")
            return False

    # --- reading --------------------------------------------------------------------------------------

    def missing(self, token_ids: TokenIds, salt: str) -> list[Extension]:
        """What would carry the prefix held in memory further."""
        path = self._store.longest_prefix(token_ids, salt)
        return self.disk.catalogue.longer_than(path[-1].end if path else 0, token_ids, salt)

    def is_loading(self, entries: Iterable[DiskEntry]) -> bool:
        """Whether the first of them is being read for this or another request."""
        wanted = {entry.record.digest for entry in entries}
        return any(wanted & set(load.digests) for load in self._loads)

    def load(self, entries: list[DiskEntry], token_ids: TokenIds, salt: str, num_bytes: int) -> None:
        """Begin to read entries that follow each other and what memory holds; `num_bytes` are reserved for them."""
        digests = tuple(entry.record.digest for entry in entries)
        hold = PathHold(self._store, self._store.longest_prefix(token_ids, salt))
        future = self._reader.submit(self._read, digests)
        kv_bytes = sum(entry.kv_bytes for entry in entries)
        self._loads.append(_Load(digests, token_ids, salt, hold, num_bytes, kv_bytes, future))

    def _read(self, digests: tuple[bytes, ...]) -> list[Stored]:
        """On the reader's thread: as many as are good."""
        found: list[Stored] = []
        for digest in digests:
            try:
                stored = self.disk.read(digest)
            except Exception:
                logger.exception("a segment could not be read")
                stored = None
            if stored is None:
                break
            found.append(stored)
        return found

    def _install(self, load: _Load) -> None:
        """Put what was read behind what memory holds, if the salt and every token before it are the request's."""
        for stored in load.result.result():
            record = stored.record
            path = self._store.longest_prefix(load.token_ids[: record.start], load.salt)
            if (path[-1].end if path else 0) != record.start or self._store.get(record.digest) is not None:
                break  # somebody was faster, or what came before has gone
            parent = path[-1] if path else None
            if segment_digest(load.salt, parent, record.token_ids) != record.digest:
                self.disk.reject(record.digest)
                break
            segment = self._store.add(load.salt, parent, record.token_ids, stored.kv)
            if stored.index is not None:
                segment.index, segment.index_state = stored.index, "ready"
            self._on_loaded(segment)

    # --- the engine's turn ----------------------------------------------------------------------------

    def settle(self) -> None:
        """Take over what the threads have finished. Between two steps only."""
        for load in [load for load in self._loads if load.result.done()]:
            self._loads.remove(load)
            self._install(load)
            load.hold.release()
            self._release(load.num_bytes)
        for digest, save in list(self._saves.items()):
            is_staged = self._is_staged(save)
            if is_staged and not save.is_kept and save.result.cancel():
                del self._saves[digest]
                self._release(0)
            elif save.result.done():
                del self._saves[digest]
                if save.is_kept:
                    self.disk.keep(digest, True)
                if save.is_deleted:
                    self.disk.remove(digest, "deleted")
                if save.is_spill:
                    self._on_spilled(save.segment, save.result.result())
                elif is_staged:
                    self._release(0)

    def close(self) -> None:
        """Write what is not on disk yet, while there is time, and let the directory go. Idempotent; no engine runs."""
        if self._is_closed:
            return
        self._is_closed = True
        for segment in sorted(self._store, key=lambda s: s.last_used, reverse=True):
            self.save(segment)
        started = time.monotonic()
        wait([save.result for save in self._saves.values()], timeout=FLUSH_SECONDS)
        self._writer.shutdown(wait=True, cancel_futures=True)
        self._reader.shutdown(wait=True, cancel_futures=True)
        for digest, save in self._saves.items():
            if save.is_kept:
                self.disk.keep(digest, True)
        self.disk.close()
        logger.info("kept %d segments on disk (%.1f s)", len(self.disk.catalogue.entries()), time.monotonic() - started)


def _bytes(segment: Segment) -> int:
    return segment.kv_bytes + segment.index_bytes
