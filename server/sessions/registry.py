"""Named sessions: what each was last asked over, what of that is held where, and what is pinned or saved.

A session is a name for a context, not an owner of memory: it keeps token ids and salt, and finds its segments by
longest prefix, since segments are merged, evicted and read again under it. Engine thread only; knows nothing of HTTP.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np

from retrieval.context import Context
from retrieval.segments import Path, PathEntry, TokenIds, common_prefix
from server.engine.recorder import Recorder
from server.engine.request import Request
from server.engine.session_info import SESSION_STATES, SessionInfo, SessionKey, SessionList
from server.errors import ConflictError, NotFoundError
from server.sessions.manager import SessionManager
from server.sessions.records import SessionRecord, SessionRecords
from server.sessions.session import Session, describe, total_bytes

REPORT_SECONDS = 1.0  # between two counts of the sessions while nothing happens to them


class SessionRegistry:
    """Sessions by key; at most `max_sessions` that are neither pinned nor saved, the longest unused ones forgotten."""

    def __init__(
        self,
        manager: SessionManager,
        recorder: Recorder,
        *,
        max_sessions: int = 1024,
        records: SessionRecords | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._manager, self._recorder, self._records = manager, recorder, records
        self._max_sessions, self._clock = max_sessions, clock
        self._sessions: dict[SessionKey, Session] = {}
        self._reported_at = -math.inf
        for record in records.load() if records is not None else []:
            self._sessions[record.key] = Session.from_record(record)

    # --- requests -------------------------------------------------------------------------------------

    def queued(self, request: Request) -> None:
        """A request that names a session has come; an unknown name becomes one."""
        if request.session is None:
            return
        session = self._sessions.get(request.session) or self._create(request.session)
        session.last_used, session.error = self._clock(), None
        session.num_requests += 1
        session.begin(request.request_id, len(request.prompt_token_ids))
        self._reported_at = -math.inf

    def opened(self, request: Request, context: Context) -> None:
        """One of its choices has its context; the first one tells what was cached."""
        session = self._of(request)
        if session is None:
            return
        running = session.running[request.request_id]
        if not running.contexts and context.num_tokens:
            session.num_hits += 1
            session.num_cached_tokens += context.num_tokens
        running.contexts.append(context)

    def closing(self, request: Request, context: Context, token_ids: list[int]) -> None:
        """One of its choices is over, and `context` about to be closed: the last such context is the session's."""
        session = self._of(request)
        if session is not None:
            running = session.running[request.request_id]
            running.contexts = [c for c in running.contexts if c is not context]
            running.last_token_ids = np.asarray(token_ids[: context.num_tokens], dtype=np.int32)

    def ended(self, request: Request, error: str | None = None) -> None:
        """The request is over, its contexts closed; what is kept of the last one is the session's context now."""
        session = self._of(request)
        if session is None:
            return
        running = session.running.pop(request.request_id)
        session.last_used, session.error = self._clock(), error
        kept = self._kept(session, running.last_token_ids)
        if common_prefix(kept, session.token_ids) < len(kept):  # not merely the beginning of what it has
            session.token_ids, session.path_digests = kept, ()
            if session.pinned_until is not None:
                self._hold(session, self._path(session))
        self._reported_at = -math.inf

    def _kept(self, session: Session, token_ids: TokenIds) -> TokenIds:
        """Those that segments hold: ends too short for one are dropped with their context."""
        path = self._manager.store.longest_prefix(token_ids, session.key.salt)
        return token_ids[: path[-1].end].copy() if path else token_ids[:0]

    def _of(self, request: Request) -> Session | None:
        return self._sessions.get(request.session) if request.session is not None else None

    # --- what callers ask for -------------------------------------------------------------------------

    def list(self, owner: str, salt: str) -> SessionList:
        """All sessions of one owner and salt, last used first."""
        self.expire()
        mine = [s for s in self._sessions.values() if (s.key.owner, s.key.salt) == (owner, salt)]
        mine.sort(key=lambda s: s.last_used, reverse=True)
        paths = self._paths()
        counts = _counts(paths)
        infos = tuple(describe(s, paths[s.key], counts, self._manager) for s in mine)
        return SessionList(infos, total_bytes(mine, paths, counts, self._manager))

    def get(self, key: SessionKey) -> SessionInfo:
        """One session. Raises `NotFoundError`."""
        self.expire()
        session = self._known(key)
        paths = self._paths()
        return describe(session, paths[key], _counts(paths), self._manager)

    def delete(self, key: SessionKey) -> int:
        """Forget a session, its files, and what no other session and no request needs; returns the bytes freed."""
        session = self._known(key)
        if session.running:
            raise ConflictError(
                f"session '{key.name}' has {len(session.running)} requests under way; wait for them or close them",
                code="session_busy",
            )
        path = self._path(session)
        self._forget(session)
        needed = {entry.segment.digest for other in self._paths().values() for entry in other}
        whole = [e.segment for e in path if e.limit == e.segment.num_tokens]
        return self._manager.discard(whole, needed)

    def pin(self, key: SessionKey, ttl_seconds: float | None) -> SessionInfo:
        """Keep its context in memory for so long (None: until unpinned, 0: no longer)."""
        session = self._known(key)
        if ttl_seconds == 0:
            self._unpin(session)
            return self.get(key)
        if session.pinned_until is None and self._num_pinned() >= self._max_sessions:
            raise ConflictError(f"{self._max_sessions} sessions are pinned, the most allowed", code="session_limit")
        self._hold(session, self._complete_path(session, "pinned"))
        session.pinned_until = math.inf if ttl_seconds is None else self._clock() + ttl_seconds
        return self.get(key)

    def save(self, key: SessionKey) -> SessionInfo:
        """Have its segments written to disk, and its record, so that it outlives this process.

        Raises `DiskUnavailableError` where there is no disk. The segments are written in the background: `is_saved`.
        """
        session = self._known(key)
        if not len(session.token_ids):
            raise ConflictError(f"session '{key.name}' holds nothing yet that could be saved", code="session_empty")
        is_new = session.saved_at is None
        if is_new and sum(s.saved_at is not None for s in self._sessions.values()) >= self._max_sessions:
            raise ConflictError(f"{self._max_sessions} sessions are saved, the most allowed", code="session_limit")
        self._manager.persist(self._complete_path(session, "saved"))
        assert self._records is not None, "whoever has a disk tier has records"
        session.saved_at = self._clock()
        self._records.write(SessionRecord(key, session.created, session.saved_at, session.token_ids))
        return self.get(key)

    def is_saved(self, key: SessionKey) -> bool:
        """Whether all of what it holds in memory is on disk too."""
        return all(self._manager.is_persisted(entry.segment) for entry in self._path(self._known(key)))

    def restore(self, key: SessionKey) -> SessionInfo:
        """Bring its context from disk into memory; nothing to do where it is there."""
        session = self._known(key)
        self._complete_path(session, "restored")
        session.last_used = self._clock()
        return self.get(key)

    def fork(self, key: SessionKey, name: str) -> SessionInfo:
        """A new session over the same context, of which both hold the same segments."""
        session, twin_key = self._known(key), SessionKey(key.owner, key.salt, name)
        if twin_key in self._sessions:
            raise ConflictError(f"there is a session '{name}' already", code="session_exists", param="id")
        if not len(session.token_ids):
            raise ConflictError(f"session '{key.name}' holds nothing yet that could be forked", code="session_empty")
        session.last_used = self._clock()
        self._create(twin_key).token_ids = session.token_ids
        return self.get(twin_key)

    # --- upkeep ---------------------------------------------------------------------------------------

    def expire(self) -> None:
        """Unpin what was pinned until now."""
        now = self._clock()
        for session in self._sessions.values():
            if session.pinned_until is not None and session.pinned_until <= now:
                self._unpin(session)

    def seconds_to_expiry(self) -> float | None:
        """Until the next pin ends; None: none ever does."""
        ends = [s.pinned_until for s in self._sessions.values() if s.pinned_until not in (None, math.inf)]
        return max(0.0, min(end for end in ends if end is not None) - self._clock()) if ends else None

    def report(self) -> None:
        """Gauges; counted at most every `REPORT_SECONDS`, except when something has happened."""
        now = self._clock()
        if 0 <= now - self._reported_at < REPORT_SECONDS:
            return
        self._reported_at = now
        self.expire()
        counts = Counter(s.state(self._path(s), self._manager) for s in self._sessions.values())
        self._recorder.sessions({state: counts[state] for state in SESSION_STATES}, self._num_pinned())

    def _num_pinned(self) -> int:
        return sum(s.pinned_until is not None for s in self._sessions.values())

    def _known(self, key: SessionKey) -> Session:
        session = self._sessions.get(key)
        if session is None:
            raise NotFoundError(f"there is no session '{key.name}'", code="session_not_found", param="id")
        return session

    def _create(self, key: SessionKey) -> Session:
        forgettable = [s for s in self._sessions.values() if s.is_forgettable]
        if len(forgettable) >= self._max_sessions:
            self._forget(min(forgettable, key=lambda s: s.last_used))
        now = self._clock()
        session = self._sessions[key] = Session(key, created=now, last_used=now)
        self._reported_at = -math.inf
        return session

    def _forget(self, session: Session) -> None:
        self._unpin(session)
        if session.saved_at is not None and self._records is not None:
            self._records.delete(session.key)
        del self._sessions[session.key]
        self._reported_at = -math.inf

    def _hold(self, session: Session, path: Path) -> None:
        """Pin the new path before the old one is let go, so that what both hold stays."""
        new = self._manager.pin(path)
        self._release(session)
        session.hold = new

    def _unpin(self, session: Session) -> None:
        self._release(session)
        session.pinned_until = None
        self._reported_at = -math.inf

    def _release(self, session: Session) -> None:
        if session.hold is not None:
            self._manager.unpin(session.hold)
            session.hold = None

    # --- where it is ----------------------------------------------------------------------------------

    def _complete_path(self, session: Session, purpose: str) -> Path:
        """All of its context in memory, read from disk where it must be. Raises `ConflictError` when it is lost."""
        path = self._path(session)
        if _end(path) < len(session.token_ids):
            path = self._manager.fetch(session.token_ids.tolist(), session.key.salt)
        if _end(path) < len(session.token_ids):
            raise ConflictError(
                f"session '{session.key.name}' cannot be {purpose}: {_end(path)} of its {len(session.token_ids)} "
                "tokens are still held; send its document again",
                code="session_evicted",
            )
        return path

    def _paths(self) -> dict[SessionKey, Path]:
        """Of every session, with the segments of its running requests."""
        return {key: self._path(session) for key, session in self._sessions.items()}

    def _path(self, session: Session) -> Path:
        """The segments in memory; found again only when one of those found last has gone or was merged."""
        known = [(self._manager.store.get(digest), limit) for digest, limit in session.path_digests]
        path = tuple(PathEntry(segment, limit) for segment, limit in known if segment is not None)
        if len(path) < len(known) or _end(path) < len(session.token_ids):
            path = self._manager.store.longest_prefix(session.token_ids, session.key.salt)
            session.path_digests = tuple((e.segment.digest, e.limit) for e in path)
        return path


def _end(path: Path) -> int:
    return path[-1].end if path else 0


def _counts(paths: Mapping[SessionKey, Path]) -> Counter[bytes]:
    """How many sessions have a segment on their path, by its digest."""
    return Counter(entry.segment.digest for path in paths.values() for entry in path)
