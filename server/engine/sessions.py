"""What callers ask of sessions, carried from the event loop to the registry on the engine thread and back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from server.engine.session_info import SessionInfo, SessionKey, SessionList
from server.sessions.registry import SessionRegistry

POLL_SECONDS = 0.02  # while a thread reads or writes


class EngineSessions:
    """The registry's operations for the event loop; each runs between two steps. Errors are the registry's."""

    def __init__(self, run: Callable[[Callable[[], Any]], Awaitable[Any]], registry: SessionRegistry) -> None:
        self._run, self._registry = run, registry

    async def list(self, owner: str, salt: str, limit: int, after: str | None) -> SessionList:
        """Sessions of one owner and salt, last used first."""
        found: SessionList = await self._run(lambda: self._registry.list(owner, salt, limit, after))
        return found

    async def get(self, key: SessionKey) -> SessionInfo:
        """One session."""
        return await self._info(lambda: self._registry.get(key))

    async def delete(self, key: SessionKey) -> int:
        """Forget it; returns the bytes freed."""
        return int(await self._run(lambda: self._registry.delete(key)))

    async def pin(self, key: SessionKey, ttl_seconds: float | None) -> SessionInfo:
        """Keep it in memory for so long; None: until unpinned, 0: no longer."""
        if ttl_seconds != 0:
            await self._read_back(key)
        return await self._info(lambda: self._registry.pin(key, ttl_seconds))

    async def save(self, key: SessionKey) -> SessionInfo:
        """Keep it on disk; returns when it is there."""
        await self._read_back(key)
        await self._run(lambda: self._registry.begin_save(key))
        while (info := await self._run(lambda: self._registry.end_save(key))) is None:  # noqa: ASYNC110 - on a thread
            await asyncio.sleep(POLL_SECONDS)
        saved: SessionInfo = info
        return saved

    async def restore(self, key: SessionKey) -> SessionInfo:
        """Bring it from disk into memory; others go on meanwhile."""
        await self._read_back(key)
        return await self._info(lambda: self._registry.restore(key))

    async def _read_back(self, key: SessionKey) -> None:
        while not await self._run(lambda: self._registry.read_back(key)):  # noqa: ASYNC110 - read on a thread
            await asyncio.sleep(POLL_SECONDS)

    async def fork(self, key: SessionKey, name: str) -> SessionInfo:
        """A new session over the same context."""
        return await self._info(lambda: self._registry.fork(key, name))

    async def _info(self, work: Callable[[], SessionInfo]) -> SessionInfo:
        info: SessionInfo = await self._run(work)
        return info
