"""A request's events on their way from the engine thread to the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress

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
        """Deliver events from the engine's thread."""
        deliver([(self, events)])

    def receive(self, events: list[Event]) -> None:
        """Take events on the stream's own loop."""
        self._events.extend(events)
        self._arrived.set()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop that submitted the request."""
        return self._loop


Batch = tuple[RequestStream, list[Event]]


def deliver(batches: list[Batch]) -> None:
    """Push events to several streams: one wake-up per event loop, since each costs a system call under the GIL."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Batch]] = {}
    for batch in batches:
        by_loop.setdefault(batch[0].loop, []).append(batch)
    for loop, own in by_loop.items():
        with suppress(RuntimeError):  # a loop that has closed meanwhile has nobody left to listen
            loop.call_soon_threadsafe(_receive_all, own)


def _receive_all(batches: list[Batch]) -> None:
    for stream, events in batches:
        stream.receive(events)
