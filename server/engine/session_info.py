"""What is told of a session, as values: made on the engine thread, read on the event loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SessionState = Literal["empty", "prefilling", "indexing", "ready", "disk", "evicted"]
SESSION_STATES: tuple[SessionState, ...] = ("empty", "prefilling", "indexing", "ready", "disk", "evicted")


@dataclass(frozen=True, slots=True)
class SessionKey:
    """A session's whole name: two owners, or two salts of one owner, never meet under the same `name`."""

    owner: str  # of the API key; empty where none is asked for
    salt: str  # cache_salt: sessions of one salt share segments
    name: str  # prompt_cache_key or X-Session-Id


@dataclass(frozen=True, slots=True)
class SessionBytes:
    """Bytes by tier; `own` and `shared` divide the segments of the host tier, `tail` is what runs now."""

    host_kv: int = 0
    host_index: int = 0
    disk: int = 0
    tail: int = 0  # K and V of running requests that no segment holds yet, on the host or the device
    own: int = 0  # of host_kv + host_index, what would go with this session
    shared: int = 0  # of host_kv + host_index, what other sessions hold too


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """One session as it stands. Times are seconds since 1970."""

    name: str
    state: SessionState
    created: float
    last_used: float
    num_tokens: int  # of its latest context
    num_tokens_in_memory: int
    num_requests: int  # that named it, the one that prefilled it included
    num_hits: int  # requests among them that found part of their prompt cached
    num_cached_tokens: int  # tokens they did not read again
    num_running: int  # requests waiting or running now
    num_prefilled_tokens: int  # of `num_prompt_tokens`, while a prompt is read; else both are 0
    num_prompt_tokens: int
    index_progress: float  # share of the indexable tokens that is indexed, 0 to 1
    is_pinned: bool
    pinned_until: float | None  # None: until it is unpinned
    saved_at: float | None  # None: not saved
    error: str | None  # why its latest request failed
    bytes: SessionBytes


@dataclass(frozen=True, slots=True)
class SessionList:
    """A page of sessions, last used first, and what they hold together: a shared segment counts once."""

    sessions: tuple[SessionInfo, ...]
    num_sessions: int  # on all pages
    has_more: bool  # after this page
    bytes: SessionBytes
