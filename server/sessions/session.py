"""One named session, and how it is described: its state, and its bytes by tier. Engine thread only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from retrieval.context import Context
from retrieval.segments import Path, PathHold, Segment, TokenIds
from server.engine.session_info import SessionBytes, SessionInfo, SessionKey, SessionState
from server.sessions.manager import SessionManager
from server.sessions.records import SessionRecord

NO_TOKENS: TokenIds = np.zeros(0, dtype=np.int32)


@dataclass(slots=True, eq=False)
class RunningRequest:
    """A request of the session that has not ended."""

    num_prompt_tokens: int
    contexts: list[Context] = field(default_factory=list)  # open ones
    last_token_ids: TokenIds = field(default_factory=lambda: NO_TOKENS)  # of the context that was closed last


@dataclass(slots=True, eq=False)
class Session:
    """A name and what it stands for. The registry owns and changes it. Times are seconds since 1970."""

    key: SessionKey
    created: float
    last_used: float
    token_ids: TokenIds = field(default_factory=lambda: NO_TOKENS)  # of its latest context, never changed in place
    path_digests: tuple[tuple[bytes, int], ...] = ()  # segments found last, and how much of each: a cache
    num_requests: int = 0
    num_hits: int = 0
    num_cached_tokens: int = 0
    running: dict[str, RunningRequest] = field(default_factory=dict)  # by request id
    pinned_until: float | None = None  # None: not pinned; infinity: until unpinned
    hold: PathHold | None = None  # on its context, while it is pinned and has one
    saved_at: float | None = None
    saved_token_ids: TokenIds = field(default_factory=lambda: NO_TOKENS)
    saving_token_ids: TokenIds | None = None  # while they are written
    seen_state: SessionState = "empty"  # when it was looked at last
    error: str | None = None  # of its latest request

    @classmethod
    def from_record(cls, key: SessionKey, record: SessionRecord) -> Session:
        """A session that an earlier process has saved."""
        session = cls(key, record.created, record.saved_at, record.token_ids)
        session.saved_at, session.saved_token_ids = record.saved_at, record.token_ids
        return session

    def begin(self, request_id: str, num_prompt_tokens: int) -> None:
        """A request of the session has come."""
        self.running[request_id] = RunningRequest(num_prompt_tokens)

    @property
    def is_forgettable(self) -> bool:
        """Whether its name may go when there are too many."""
        return not self.running and self.pinned_until is None and self.saved_at is None and not self.is_saving

    @property
    def is_saving(self) -> bool:
        """Whether it is being written to disk."""
        return self.saving_token_ids is not None

    @property
    def reading(self) -> RunningRequest | None:
        """A request whose prompt is still to be read, or being read."""
        return next((r for r in self.running.values() if _num_read(r) < r.num_prompt_tokens), None)


def describe(
    session: Session, state: SessionState, path: Path, counts: Mapping[bytes, int], manager: SessionManager
) -> SessionInfo:
    """All that is told of a session. `counts`: sessions that have a segment on their path, by its digest."""
    reading = session.reading
    contexts = [c for running in session.running.values() for c in running.contexts]
    segments = held_segments([session], {session.key: path})
    pinned_until = session.pinned_until
    return SessionInfo(
        name=session.key.name,
        state=state,
        created=session.created,
        last_used=session.last_used,
        num_tokens=max([len(session.token_ids), *(c.num_tokens for c in contexts)]),
        num_tokens_in_memory=max([path[-1].end if path else 0, *(c.num_tokens for c in contexts)]),
        num_requests=session.num_requests,
        num_hits=session.num_hits,
        num_cached_tokens=session.num_cached_tokens,
        num_running=len(session.running),
        num_prefilled_tokens=_num_read(reading) if reading else 0,
        num_prompt_tokens=reading.num_prompt_tokens if reading else 0,
        index_progress=_index_progress(segments) if segments or not reading else 0.0,
        is_pinned=pinned_until is not None,
        pinned_until=None if pinned_until == math.inf else pinned_until,
        saved_at=session.saved_at,
        error=session.error,
        bytes=_bytes([session], segments, counts, manager),
    )


def total_bytes(
    sessions: Iterable[Session], paths: Mapping[SessionKey, Path], counts: Mapping[bytes, int], manager: SessionManager
) -> SessionBytes:
    """What some sessions hold together: each segment once."""
    sessions = list(sessions)
    return _bytes(sessions, held_segments(sessions, paths), counts, manager)


def held_segments(sessions: Iterable[Session], paths: Mapping[SessionKey, Path]) -> list[Segment]:
    """Segments of the sessions' contexts and of their running requests, each once."""
    found: dict[int, Segment] = {}
    for session in sessions:
        running = [c.path for request in session.running.values() for c in request.contexts]
        for path in (paths[session.key], *running):
            found |= {id(entry.segment): entry.segment for entry in path}
    return list(found.values())


def _bytes(
    sessions: list[Session], segments: list[Segment], counts: Mapping[bytes, int], manager: SessionManager
) -> SessionBytes:
    shared = sum(s.kv_bytes + s.index_bytes for s in segments if counts.get(s.digest, 0) > 1)
    kv, index = sum(s.kv_bytes for s in segments), sum(s.index_bytes for s in segments)
    tails = [c.tail_bytes for s in sessions for r in s.running.values() for c in r.contexts]
    return SessionBytes(
        host_kv=kv,
        host_index=index,
        disk=manager.disk_bytes_of((s.token_ids, s.key.salt) for s in sessions),
        tail=sum(tails),
        own=kv + index - shared,
        shared=shared,
    )


def _num_read(request: RunningRequest) -> int:
    """Tokens of the prompt whose K and V are there."""
    if not request.contexts:  # not started, or over but for its last event
        return len(request.last_token_ids)
    return min(request.num_prompt_tokens, max(c.num_tokens for c in request.contexts))


def _index_progress(segments: Iterable[Segment]) -> float:
    """Indexed share of the tokens that have an index or are getting one."""
    indexed = sum(s.num_tokens for s in segments if s.index is not None)
    pending = sum(s.num_tokens for s in segments if s.index is None and s.index_state == "building")
    return indexed / (indexed + pending) if indexed + pending else 1.0
