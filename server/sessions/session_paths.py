"""Where a session's context is: its segments in memory, found by longest prefix, and what disk can give back.

Segments are merged, evicted and read again under a session, so what was found last is only a cache. Engine thread.
"""

from __future__ import annotations

from retrieval.segments import Path, PathEntry
from server.engine.session_info import SessionState
from server.errors import ConflictError, MemoryExhaustedError
from server.sessions.manager import SessionManager
from server.sessions.session import Session


class SessionPaths:
    """Finds the paths of sessions."""

    def __init__(self, manager: SessionManager) -> None:
        self._manager = manager

    def find(self, session: Session) -> Path:
        """The segments in memory; searched for only when one of those found last has gone or was merged."""
        path = self.last(session)
        if len(path) < len(session.path_digests) or end_of(path) < len(session.token_ids):
            path = self._manager.store.longest_prefix(session.token_ids, session.key.salt)
            session.path_digests = tuple((e.segment.digest, e.limit) for e in path)
        return path

    def last(self, session: Session) -> Path:
        """Of what was found last, what is still there; cheap."""
        known = [(self._manager.store.get(digest), limit) for digest, limit in session.path_digests]
        return tuple(PathEntry(segment, limit) for segment, limit in known if segment is not None)

    def complete(self, session: Session, purpose: str) -> Path:
        """All of its context, in memory.

        Raises `MemoryExhaustedError` when there is no room for what is on disk, `ConflictError` when part is lost.
        """
        path, num_tokens = self.find(session), len(session.token_ids)
        if end_of(path) < num_tokens:
            if self._manager.num_tokens_on_disk(session.token_ids, session.key.salt) >= num_tokens:
                raise self._no_room()
            raise ConflictError(
                f"session '{session.key.name}' cannot be {purpose}: {end_of(path)} of its {num_tokens} tokens are "
                "still held; send its document again",
                code="session_evicted",
            )
        return path

    def read_back(self, session: Session) -> bool:
        """Have what disk holds of it read into memory; False: under way. Raises `MemoryExhaustedError`."""
        if end_of(self.find(session)) >= len(session.token_ids):
            return True
        following = [*session.token_ids.tolist(), 0]  # the last token of a prompt is never looked for
        if self._manager.prepare(following, session.key.salt, at_any_cost=True):
            return True
        if not self._manager.num_pending:
            raise self._no_room()
        return False

    def _no_room(self) -> MemoryExhaustedError:
        stats = self._manager.stats()
        return MemoryExhaustedError(
            f"no memory to read the session from disk: {stats.kv_bytes + stats.index_bytes} bytes held, "
            f"{self._manager.pinned_bytes} of them pinned, and {stats.reserved_bytes} reserved of {stats.limit_bytes}"
        )

    def state(self, session: Session) -> SessionState:
        """What the session waits for, or where its context is."""
        if session.reading is not None:
            return "prefilling"
        if not len(session.token_ids):
            return "empty"
        path = self.find(session)
        if end_of(path) < len(session.token_ids):
            held = self._manager.num_tokens_on_disk(session.token_ids, session.key.salt)
            return "disk" if held >= len(session.token_ids) else "evicted"
        return "indexing" if any(e.segment.index_state == "building" for e in path) else "ready"

    def is_in_memory(self, session: Session) -> bool:
        """Whether all of it was found last time and is still there; cheap."""
        path = self.last(session)
        return len(path) == len(session.path_digests) and end_of(path) >= len(session.token_ids)


def end_of(path: Path) -> int:
    """Tokens that a path covers."""
    return path[-1].end if path else 0
