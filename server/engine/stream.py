"""A request's events on their way from the engine thread to the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from server.engine.events import Done, Event, Failure


class RequestStream:
    """Async iterator over one request's events; ends after `Done` or `Failure`.

    `push` is for the engine thread, everything else for the event loop that submitted the request.
    """

    def __init__(self, request_id: str, on_end: Callable[[str, int | None], None]) -> None:
        self.request_id = request_id
        self._on_end = on_end  # called with the id and the choice that is over; None: all of them, given up
        self._loop = asyncio.get_running_loop()
        self._events: deque[Event] = deque()
        self._arrived = asyncio.Event()
        self._is_over = False

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> Event:
        if self._is_over and not self._events:
            raise StopAsyncIteration
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        event = self._events.popleft()
        self._is_over = isinstance(event, Done | Failure)
        return event

    def abort(self) -> None:
        """Tell the engine to drop the request within one step; idempotent, harmless after the end."""
        self._on_end(self.request_id, None)

    def stop(self, choice: int) -> None:
        """Tell the engine that one choice is complete, such as by a stop string; harmless after its end."""
        self._on_end(self.request_id, choice)

    def push(self, events: list[Event]) -> None:
        """Deliver events; a loop that has closed meanwhile has nobody left to listen."""
        try:
            self._loop.call_soon_threadsafe(self._receive, events)
        except RuntimeError:
            return

    def _receive(self, events: list[Event]) -> None:
        self._events.extend(events)
        self._arrived.set()
