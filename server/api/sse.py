"""Server-sent events: the wire format, and a response that keeps alive, notices a disconnect and ends in one way.

The answer starts with the first event (or the first keep-alive), so that an error before it is a plain HTTP error;
afterwards an error is an event, as in vLLM.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.errors import anthropic_envelope, envelope, error_response, internal_error
from server.engine.events import Progress
from server.errors import ServerError

DONE = "data: [DONE]\n\n"
_encode = json.JSONEncoder(ensure_ascii=False).encode
KEEP_ALIVE = ": keep-alive\n\n"


def event(model: BaseModel) -> str:
    """A chunk as an event; only fields that were set are written."""
    return f"data: {model.model_dump_json(exclude_unset=True)}\n\n"


class TextEvents:
    """Events that differ in one text only: the JSON around it is rendered once, not for every token."""

    MARK = "\ue000"  # where the text goes; private use, so nothing else in a chunk holds it

    def __init__(self, marked: BaseModel) -> None:
        """`marked`: a chunk whose text is `MARK`."""
        self._before, self._after = event(marked).rsplit(f'"{self.MARK}"', 1)  # what comes before names the model

    def render(self, text: str) -> str:
        """As `event` renders the chunk with `text` in the mark's place."""
        return self._before + _encode(text) + self._after


def named_event(name: str, data: dict[str, Any]) -> str:
    """An event of the protocols whose events have names."""
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def error_event(error: ServerError) -> str:
    """An error after the stream began."""
    return f"data: {envelope(error)}\n\n{DONE}"


def named_error(error: ServerError) -> str:
    """The same where events have names."""
    fields = {"code": error.code, "message": error.message, "param": error.param, "sequence_number": 0}
    return named_event("error", {"type": "error", **fields})


def anthropic_error(error: ServerError) -> str:
    """The same in Anthropic's protocol."""
    return f"event: error\ndata: {anthropic_envelope(error)}\n\n"


def comment(progress: Progress) -> str:
    """What clients ignore and people with curl read."""
    return f": prefill {progress.num_prefilled_tokens}/{progress.num_prompt_tokens}\n\n"


class EventStream(Response):
    """Sends `events` until they end, fail, or the client goes away, which closes the generator at once."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[str],
        keepalive_seconds: float,
        render_error: Callable[[ServerError], str] = error_event,
    ) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        self._keepalive_seconds = keepalive_seconds
        self._render_error = render_error
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = _Writer(send, self)
        produce = asyncio.create_task(self._produce(writer, scope, receive, send))
        gone = asyncio.create_task(disconnected(receive))
        beat = asyncio.create_task(self._keep_alive(writer))
        try:
            await asyncio.wait([produce, gone], return_when=asyncio.FIRST_COMPLETED)
            if produce.done():
                produce.result()
        finally:
            for task in (produce, gone, beat):
                task.cancel()
            await asyncio.gather(produce, gone, beat, return_exceptions=True)

    async def _produce(self, writer: _Writer, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._events) as events:
                async for text in events:
                    await writer.write(text)
        except Exception as error:  # the answer has begun: nobody above could still tell the client
            known = error if isinstance(error, ServerError) else internal_error(error)
            if not writer.is_started:
                writer.is_closed = True
                await error_response(known, path=scope["path"])(scope, receive, send)
                return
            await writer.write(self._render_error(known))
        await writer.close()

    async def _keep_alive(self, writer: _Writer) -> None:
        while True:
            num_written = writer.num_written
            await asyncio.sleep(self._keepalive_seconds)
            if writer.num_written == num_written and not writer.is_closed:
                await writer.write(writer.last_comment)


class _Writer:
    """The open answer; one write at a time."""

    def __init__(self, send: Send, response: EventStream) -> None:
        self._send = send
        self._response = response
        self._lock = asyncio.Lock()
        self.is_started = False
        self.is_closed = False
        self.num_written = 0
        self.last_comment = KEEP_ALIVE

    async def write(self, text: str) -> None:
        self.num_written += 1
        self.last_comment = text if text.startswith(":") else KEEP_ALIVE
        await self._body(text.encode(), has_more=True)

    async def close(self) -> None:
        self.is_closed = True
        await self._body(b"", has_more=False)

    async def _body(self, body: bytes, has_more: bool) -> None:
        must_start, self.is_started = not self.is_started, True
        async with self._lock:
            if must_start:
                headers = self._response.raw_headers
                await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            await self._send({"type": "http.response.body", "body": body, "more_body": has_more})


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone; the request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
