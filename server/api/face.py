"""What the API needs of an engine, as protocols; `server.engine.engine.Engine` is the real one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from server.engine.events import Event
from server.engine.request import Request
from server.engine.session_info import SessionInfo, SessionKey, SessionList


class StreamFace(Protocol):
    """The events of one request; ends after Done or Failure. Used on the event loop only."""

    def __aiter__(self) -> AsyncIterator[Event]:
        """The events in order."""

    def abort(self) -> None:
        """Drops the request within one step; may be called any time and more than once."""

    def stop(self, choice: int) -> None:
        """Ends one choice within one step, as complete; may be called any time and more than once."""


class SessionsFace(Protocol):
    """What can be asked of named sessions. All raise NotFoundError, ConflictError, UnavailableError."""

    async def list(self, owner: str, salt: str, limit: int, after: str | None) -> SessionList:
        """Up to `limit` sessions of one owner and salt, last used first, after the one of that name."""

    async def get(self, key: SessionKey) -> SessionInfo:
        """One session."""

    async def delete(self, key: SessionKey) -> int:
        """Forgets it; returns the bytes freed."""

    async def pin(self, key: SessionKey, ttl_seconds: float | None) -> SessionInfo:
        """Keeps it in memory for so long; None: until unpinned, 0: no longer."""

    async def save(self, key: SessionKey) -> SessionInfo:
        """Keeps it on disk; returns when it is there. Raises DiskUnavailableError."""

    async def restore(self, key: SessionKey) -> SessionInfo:
        """Brings it from disk into memory."""

    async def fork(self, key: SessionKey, name: str) -> SessionInfo:
        """A new session over the same context."""


class EngineFace(Protocol):
    """Takes requests and streams events back. Used on the event loop only."""

    @property
    def sessions(self) -> SessionsFace:
        """The named sessions."""

    @property
    def model_name(self) -> str:
        """Folder or hub name of the model."""

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together."""

    @property
    def is_alive(self) -> bool:
        """Whether the engine thread still runs."""

    def submit(self, request: Request) -> StreamFace:
        """Queues a request. Raises ContextLengthError, RateLimitError, MemoryExhaustedError, UnavailableError."""

    async def stop(self, drain_seconds: float) -> None:
        """Refuses new requests, lets running ones finish, then fails the rest as `shutting_down`."""
