"""Segments on disk: writing, reading and removing what one directory holds for this model.

Owns the catalogue and the quota; the files are `disk_files`' and their format `retrieval.segment_file`'s. Every
failure of the disk is counted and treated as a miss. Any thread may call; `write` and `read` take long.

    DIRECTORY/lock                   held while a server runs
    DIRECTORY/MODEL/DIGEST.segment   K and V, a safetensors file; the segment is there when this file is
    DIRECTORY/MODEL/DIGEST.index     its indexes, if they were ready
    DIRECTORY/MODEL/DIGEST.keep      empty: the quota leaves this segment alone
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from retrieval.geometry import Geometry
from retrieval.index_files import IndexFiles
from retrieval.kv_buffer import KvBuffer
from retrieval.segment_file import SegmentRecord, read_record, read_segment, segment_bytes, write_segment
from retrieval.segment_index import SegmentIndex
from retrieval.segments import TokenIds
from retrieval.tensor_file import TensorFileError
from server.engine.recorder import Recorder
from server.sessions.catalogue import Catalogue, DiskEntry
from server.sessions.disk_files import DiskFiles, lock_directory
from server.sessions.policy import Candidate, choose_victims, prefill_seconds

INDEX_HEADER_BYTES = 4096  # about
FREE_SHARE = 0.5  # of the file system's free bytes: the quota where none is given


@dataclass(frozen=True, slots=True)
class DiskStats:
    """What is held now."""

    num_segments: int = 0
    kv_bytes: int = 0
    index_bytes: int = 0
    limit_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A segment to write, and what the quota weighs it by."""

    record: SegmentRecord
    kv: KvBuffer
    index: SegmentIndex | None
    salt: str
    context_ids: TokenIds  # all tokens from 0 to its end
    last_used: float  # wall clock
    num_hits: int = 0
    is_kept: bool = False


@dataclass(frozen=True, slots=True)
class Stored:
    """What a read brings into memory."""

    record: SegmentRecord
    kv: KvBuffer
    index: SegmentIndex | None


class Disk:
    """The catalogue of one model's files."""

    def __init__(
        self,
        files: DiskFiles,
        lock: IO[str],
        limit_bytes: int,
        model: str,
        geometry: Geometry,
        indexes: IndexFiles | None,
        recorder: Recorder,
        pin_memory: bool = False,
    ) -> None:
        """model: fingerprint of what K and V are computed with. indexes: how they are written; None: not at all."""
        self.limit_bytes = limit_bytes
        self.model = model
        self._files, self._lock, self._geometry = files, lock, geometry
        self._indexes, self._recorder, self._pin_memory = indexes, recorder, pin_memory
        self.catalogue = Catalogue()

    def scan(self) -> None:
        """Fill the catalogue from the directory: headers and token ids are checked now, K and V when they are read."""
        self._files.tidy()
        for path in self._files.segments():
            try:
                record = read_record(path, self.model)
                if record.digest.hex() != path.stem:
                    raise TensorFileError(path, "damaged", "bears another segment's name")
                status = path.stat()
            except TensorFileError as error:
                self._files.unusable(error)
                if error.reason == "damaged":
                    self._files.remove(bytes.fromhex(path.stem) if _is_hex(path.stem) else b"")
                continue
            index, is_kept = path.with_suffix(".index"), path.with_suffix(".keep").exists()
            index_bytes = index.stat().st_size if index.exists() else 0
            self.catalogue.add(DiskEntry(record, status.st_size, index_bytes, status.st_mtime, is_kept=is_kept))

    # --- what is there --------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """Where this model's files are."""
        return self._files.folder

    @property
    def keeps_indexes(self) -> bool:
        """Whether indexes are written too."""
        return self._indexes is not None

    def stats(self) -> DiskStats:
        """Figures for metrics."""
        entries = self.catalogue.entries()
        kv_bytes, index_bytes = sum(e.kv_bytes for e in entries), sum(e.index_bytes for e in entries)
        return DiskStats(len(entries), kv_bytes, index_bytes, self.limit_bytes)

    def touch(self, digest: bytes) -> None:
        """Note a use; on the disk itself at most once a minute."""
        entry, now = self.catalogue.get(digest), time.time()
        if entry is not None:
            entry.num_hits += 1
            if now - entry.last_used > 60.0:
                self._files.touch(digest, now)
            entry.last_used = now

    def keep(self, digest: bytes, is_kept: bool) -> None:
        """Whether the quota must leave this entry alone; survives a restart."""
        entry = self.catalogue.get(digest)
        if entry is not None and entry.is_kept != is_kept:
            entry.is_kept = is_kept
            self._files.mark(digest, is_kept)

    # --- writing --------------------------------------------------------------------------------------

    def write(self, segment: Outgoing) -> bool:
        """Put a segment on disk unless it is there, or worth less than what would have to go; whether it is there."""
        record = segment.record
        if self.catalogue.get(record.digest) is None:
            if not self._make_room(segment):
                return False
            started = time.perf_counter()
            written = self._files.write(
                record.digest, "segment", lambda path: write_segment(path, record, segment.kv, self.model)
            )
            if written is None:
                return False
            self._recorder.disk("write", written, time.perf_counter() - started)
            self._files.touch(record.digest, segment.last_used)
            entry = DiskEntry(record, written, last_used=segment.last_used, num_hits=segment.num_hits)
            self.catalogue.add(entry)
            self._drop_superseded(record, segment.salt, segment.context_ids)
        if segment.is_kept:
            self.keep(record.digest, True)
        if segment.index is not None:
            self._write_index(record.digest, segment.index)
        return True

    def _write_index(self, digest: bytes, index: SegmentIndex) -> None:
        entry, indexes = self.catalogue.get(digest), self._indexes
        if entry is not None and not entry.index_bytes and indexes is not None:
            entry.index_bytes = self._files.write(digest, "index", lambda p: indexes.write(p, digest, index)) or 0

    def _make_room(self, segment: Outgoing) -> bool:
        """Whether quota and file system take it, after less valuable entries have gone; nothing goes in vain."""
        newcomer = DiskEntry(
            segment.record,
            segment_bytes(segment.record, segment.kv, self.model),
            0 if segment.index is None else segment.index.nbytes + INDEX_HEADER_BYTES,
            segment.last_used,
            segment.num_hits,
            segment.is_kept,
        )
        entries, now = self.catalogue.entries(), time.time()
        room = min(self.limit_bytes - sum(e.num_bytes for e in entries), self._files.free_bytes())
        if room >= newcomer.num_bytes:
            return True
        missing = newcomer.num_bytes - room
        others = [_candidate(e, now) for e in entries if not e.is_kept]
        victims = choose_victims(others, missing)
        if sum(victim.num_bytes for victim in victims) < missing:
            self._files.failed("kv_disk_full", f"no room for {newcomer.num_bytes} bytes in {self._files.folder}")
            return False
        keys = {victim.key for victim in victims}
        if not newcomer.is_kept and _candidate(newcomer, now).cost < max(c.cost for c in others if c.key in keys):
            return False
        for victim in victims:
            self.remove(victim.key, "quota")
        return True

    def _drop_superseded(self, record: SegmentRecord, salt: str, context_ids: TokenIds) -> None:
        """Remove what the new entry holds too: parts it was merged from, earlier turns of the same chat."""
        for entry in self.catalogue.continuing(context_ids, salt):
            other = entry.record
            if other.digest == record.digest or other.start < record.start or other.end > record.end:
                continue
            if np.array_equal(other.token_ids, context_ids[other.start : other.end]):
                if entry.is_kept:
                    self.keep(record.digest, True)
                self.remove(other.digest, "superseded")

    # --- reading --------------------------------------------------------------------------------------

    def read(self, digest: bytes) -> Stored | None:
        """A segment read and checked as a whole; None, and the entry is forgotten, if that cannot be."""
        path, entry, started = self._files.path(digest, "segment"), self.catalogue.get(digest), time.perf_counter()
        if entry is None:
            return None  # the quota was faster
        try:
            record, kv = read_segment(path, self.model, self._geometry, self._pin_memory)
            if record.digest != digest:
                raise TensorFileError(path, "damaged", "bears another segment's name")
        except TensorFileError as error:
            self._files.unusable(error)
            self.remove(digest, error.reason, delete=error.reason == "damaged")
            return None
        self.touch(digest)
        index = self._read_index(record, kv)
        self._recorder.disk("read", entry.num_bytes, time.perf_counter() - started)
        return Stored(record, kv, index)

    def _read_index(self, record: SegmentRecord, kv: KvBuffer) -> SegmentIndex | None:
        entry = self.catalogue.get(record.digest)
        if self._indexes is None or entry is None or not entry.index_bytes:
            return None
        index = None
        try:
            index = self._indexes.read(self._files.path(record.digest, "index"), record.digest, record.start, kv)
        except TensorFileError as error:
            self._files.unusable(error)
        if index is None:  # damaged, or built otherwise: the next write puts a better one there
            entry.index_bytes = 0
            self._files.remove(record.digest, ("index",))
        return index

    def reject(self, digest: bytes) -> None:
        """Count a file whose tokens are not those its name stands for, and delete it."""
        self._files.unusable(TensorFileError(self._files.path(digest, "segment"), "damaged", "is not what it says"))
        self.remove(digest, "damaged")

    def remove(self, digest: bytes, reason: str, delete: bool = True) -> int:
        """Forget an entry, and delete its files; returns the bytes freed."""
        entry = self.catalogue.pop(digest)
        if entry is None:
            return 0
        if delete:
            self._files.remove(digest)
        self._recorder.eviction("disk", reason, entry.num_bytes)
        return entry.num_bytes

    def close(self) -> None:
        """Let another server have the directory."""
        self._lock.close()


def open_disk(
    directory: Path,
    limit_bytes: int,
    model: str,
    geometry: Geometry,
    indexes: IndexFiles | None,
    recorder: Recorder,
    pin_memory: bool = False,
) -> Disk:
    """Lock and read a directory; `limit_bytes` 0: by what is free. Raises `OSError` if it cannot be used."""
    lock = lock_directory(directory)
    try:
        files = DiskFiles(directory / model[:32], recorder)
        disk = Disk(files, lock, limit_bytes, model, geometry, indexes, recorder, pin_memory)
        disk.scan()
    except BaseException:
        lock.close()
        raise
    if not limit_bytes:
        disk.limit_bytes = disk.stats().kv_bytes + disk.stats().index_bytes + int(FREE_SHARE * files.free_bytes())
    return disk


def _candidate(entry: DiskEntry, now: float) -> Candidate:
    """An entry as the policy sees it: what is lost is the prefill, less nothing (reading it is fast)."""
    return Candidate(
        key=entry.record.digest,
        parent=None,  # use reaches all of a path, so what comes before is never older than what follows
        num_bytes=entry.num_bytes,
        restore_seconds=prefill_seconds(entry.record.start, len(entry.record.token_ids)),
        idle_seconds=max(0.0, now - entry.last_used),
        num_references=0,
        num_hits=entry.num_hits,
    )


def _is_hex(text: str) -> bool:
    return len(text) % 2 == 0 and all(c in "0123456789abcdef" for c in text)
