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
from retrieval.segments import Path, TokenIds, common_prefix
from server.engine.recorder import Recorder
from server.engine.request import Request
from server.engine.session_info import SESSION_STATES, SessionInfo, SessionKey, SessionList
from server.errors import ConflictError, NotFoundError
from server.sessions.manager import SessionManager
from server.sessions.records import SessionRecords
from server.sessions.saving import Saving
from server.sessions.session import Session, describe, total_bytes
from server.sessions.session_paths import SessionPaths

REPORT_SECONDS = 1.0  # between two counts of the sessions while nothing happens to them
LOOKS_PER_REPORT = 16  # sessions not wholly in memory that a report searches for; the others are as seen last


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
        self._manager, self._recorder = manager, recorder
        self._max_sessions, self._clock = max_sessions, clock
        self._paths = SessionPaths(manager)
        self._sessions: dict[SessionKey, Session] = {}
        self._saving = Saving(manager, self._paths, records, clock)
        self._reported_at = -math.inf

    # --- requests -------------------------------------------------------------------------------------

    def queued(self, request: Request) -> None:
        """A request that names a session has come; an unknown name becomes one."""
        if request.session is None:
            return
        self._wake(request.session.owner, request.session.salt)
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
                self._hold(session, self._paths.find(session))
        session.seen_state = self._paths.state(session)
        self._reported_at = -math.inf

    def _kept(self, session: Session, token_ids: TokenIds) -> TokenIds:
        """Those that segments hold: ends too short for one are dropped with their context."""
        path = self._manager.store.longest_prefix(token_ids, session.key.salt)
        return token_ids[: path[-1].end].copy() if path else token_ids[:0]

    def _of(self, request: Request) -> Session | None:
        return self._sessions.get(request.session) if request.session is not None else None

    # --- what callers ask for -------------------------------------------------------------------------

    def list(self, owner: str, salt: str, limit: int, after: str | None) -> SessionList:
        """Sessions of one owner and salt, last used first: up to `limit` of them, after the one of that name.

        Raises `NotFoundError` when `after` names none.
        """
        self.expire()
        self._wake(owner, salt)
        mine = [s for s in self._sessions.values() if (s.key.owner, s.key.salt) == (owner, salt)]
        mine.sort(key=lambda s: s.last_used, reverse=True)
        begin = 0 if after is None else mine.index(self._known(SessionKey(owner, salt, after))) + 1
        page = mine[begin : begin + limit]
        paths = {session.key: self._paths.find(session) for session in page}
        counts = self._counts()
        infos = tuple(self._describe(session, paths[session.key], counts) for session in page)
        return SessionList(infos, len(mine), begin + limit < len(mine), total_bytes(page, paths, counts, self._manager))

    def get(self, key: SessionKey) -> SessionInfo:
        """One session. Raises `NotFoundError`."""
        self.expire()
        session = self._known(key)
        path = self._paths.find(session)
        return self._describe(session, path, self._counts())

    def delete(self, key: SessionKey) -> int:
        """Forget a session, its files, and what no other session and no request needs; returns the bytes freed."""
        session = self._known(key)
        if session.running or self._saving.is_writing(session):
            what = f"has {len(session.running)} requests under way" if session.running else "is being saved"
            raise ConflictError(f"session '{key.name}' {what}; try again when that has ended", code="session_busy")
        path = self._paths.find(session)
        self._forget(session)
        needed = {entry.segment.digest for other in self._sessions.values() for entry in self._paths.find(other)}
        whole = [e.segment for e in path if e.limit == e.segment.num_tokens]
        num_bytes = self._manager.discard(whole, needed)
        self._saving.delete(session, self._sessions.values())  # the files that were there; none comes any more
        return num_bytes

    def read_back(self, key: SessionKey) -> bool:
        """Have its context read from disk into memory, where it must be; False: under way."""
        return self._paths.read_back(self._known(key))

    def pin(self, key: SessionKey, ttl_seconds: float | None) -> SessionInfo:
        """Keep its context, which is in memory, there for so long (None: until unpinned, 0: no longer)."""
        session = self._known(key)
        if ttl_seconds == 0:
            self._unpin(session)
            return self.get(key)
        if session.pinned_until is None and self._num_pinned() >= self._max_sessions:
            raise ConflictError(f"{self._max_sessions} sessions are pinned, the most allowed", code="session_limit")
        self._hold(session, self._paths.complete(session, "pinned"))
        session.pinned_until = math.inf if ttl_seconds is None else self._clock() + ttl_seconds
        return self.get(key)

    def begin_save(self, key: SessionKey) -> None:
        """Have its segments written to disk in the background; `end_save` tells when they are there.

        Raises `DiskUnavailableError` where there is no disk.
        """
        session = self._known(key)
        if not len(session.token_ids):
            raise ConflictError(f"session '{key.name}' holds nothing yet that could be saved", code="session_empty")
        saved = {s.key for s in self._sessions.values() if s.saved_at is not None or s.is_saving}
        if len(saved - {key}) >= self._max_sessions:
            raise ConflictError(f"{self._max_sessions} sessions are saved, the most allowed", code="session_limit")
        self._saving.begin(session)

    def end_save(self, key: SessionKey) -> SessionInfo | None:
        """Its record stands for what is on disk now; None: not all of it yet. Raises when it cannot be written."""
        return self.get(key) if self._saving.end(self._known(key), self._sessions.values()) else None

    def restore(self, key: SessionKey) -> SessionInfo:
        """Its context is in memory, after `read_back`, and used. Raises `ConflictError` where it is not."""
        session = self._known(key)
        self._paths.complete(session, "restored")
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
        searched = 0
        for session in list(self._sessions.values()):
            if session.running or self._paths.is_in_memory(session):
                session.seen_state = self._paths.state(session)
            elif searched < LOOKS_PER_REPORT:  # and to the end of the line, so that every one has its turn
                searched += 1
                session.seen_state = self._paths.state(session)
                self._sessions[session.key] = self._sessions.pop(session.key)
        counts = Counter(session.seen_state for session in self._sessions.values())
        counts["disk"] += self._saving.num_dormant
        self._recorder.sessions({state: counts[state] for state in SESSION_STATES}, self._num_pinned())

    def _num_pinned(self) -> int:
        return sum(s.pinned_until is not None for s in self._sessions.values())

    def _wake(self, owner: str, salt: str) -> None:
        """A tenant has come: what it had saved in an earlier process is known again."""
        self._sessions |= {session.key: session for session in self._saving.wake(owner, salt)}

    def _known(self, key: SessionKey) -> Session:
        self._wake(key.owner, key.salt)
        session = self._sessions.get(key)
        if session is None:
            raise NotFoundError(f"there is no session '{key.name}'", code="session_not_found", param="id")
        return session

    def _describe(self, session: Session, path: Path, counts: Mapping[bytes, int]) -> SessionInfo:
        session.seen_state = self._paths.state(session)
        return describe(session, session.seen_state, path, counts, self._manager)

    def _counts(self) -> Counter[bytes]:
        """How many sessions have a segment on their path, by its digest; as seen last."""
        return Counter(digest for session in self._sessions.values() for digest, _ in session.path_digests)

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
