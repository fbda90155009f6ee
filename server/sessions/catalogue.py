"""What is on disk, and how a prompt finds what carries its prefix further. Knows no files; any thread may call."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from retrieval.segment_file import PrefixDigests, SegmentRecord
from retrieval.segments import TokenIds, common_prefix


@dataclass(eq=False, slots=True)
class DiskEntry:
    """One segment on disk."""

    record: SegmentRecord
    kv_bytes: int
    index_bytes: int = 0
    last_used: float = field(default_factory=time.time)  # wall clock, as the file's mtime: it outlives the process
    num_hits: int = 0
    is_kept: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of its files."""
        return self.kv_bytes + self.index_bytes


@dataclass(frozen=True, slots=True)
class Extension:
    """What an entry adds to a prefix: tokens `[begin, end)`; those before it are held, wherever."""

    entry: DiskEntry
    begin: int
    end: int


class Catalogue:
    """Entries by the digest of their segment."""

    def __init__(self) -> None:
        self._entries: dict[bytes, DiskEntry] = {}
        self._guard = threading.Lock()

    def add(self, entry: DiskEntry) -> None:
        """Hold an entry."""
        with self._guard:
            self._entries[entry.record.digest] = entry

    def pop(self, digest: bytes) -> DiskEntry | None:
        """Forget an entry."""
        with self._guard:
            return self._entries.pop(digest, None)

    def get(self, digest: bytes) -> DiskEntry | None:
        """The entry of a segment whose K and V are safely on disk."""
        with self._guard:
            return self._entries.get(digest)

    def entries(self) -> list[DiskEntry]:
        """All entries now."""
        with self._guard:
            return list(self._entries.values())

    def longer_than(self, reach: int, token_ids: TokenIds, salt: str) -> list[Extension]:
        """Entries that, one after the other, carry a prefix of `reach` tokens further.

        How the prefix before them is cut does not matter, nor where it is held.
        """
        found = [
            (entry, entry.record.start + common_prefix(entry.record.token_ids, token_ids[entry.record.start :]))
            for entry in self.continuing(token_ids, salt)
        ]
        chain: list[Extension] = []
        while further := [(entry, end) for entry, end in found if entry.record.start <= reach < end]:
            entry, end = max(further, key=lambda item: item[1])
            chain.append(Extension(entry, reach, end))
            reach = end
        return chain

    def serving(self, token_ids: TokenIds, salt: str) -> list[DiskEntry]:
        """Entries that hold tokens of a context."""
        return [
            entry
            for entry in self.continuing(token_ids, salt)
            if common_prefix(entry.record.token_ids, token_ids[entry.record.start :])
        ]

    def continuing(self, token_ids: TokenIds, salt: str) -> list[DiskEntry]:
        """Entries whose tokens before their own are the prompt's."""
        entries = [e for e in self.entries() if e.record.start < len(token_ids)]
        digests = PrefixDigests(salt, token_ids)
        above = {start: digests.at(start) for start in sorted({e.record.start for e in entries})}
        return [e for e in entries if above[e.record.start] == e.record.above]
