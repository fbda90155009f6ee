"""Calls of the API before anybody can make one, answered by an engine that only echoes.

Whatever is made when something is used for the first time (routes, validators, templates, threads, buffers) is made
then, and belongs to what the process holds from the start. Leaves nothing in the engine and counts nothing.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from server.api.face import EngineFace, SessionsFace, StreamFace
from server.engine.events import Done, Event, Finish, Token, Usage
from server.engine.request import Request
from server.engine.stream import RequestStream, deliver

AsgiMessage = MutableMapping[str, Any]
AsgiApp = Callable[
    [
        MutableMapping[str, Any],
        Callable[[], Awaitable[AsgiMessage]],
        Callable[[AsgiMessage], Awaitable[None]],
    ],
    Awaitable[None],
]
WORDS = "warm " * 8192  # so long that it is encoded on a thread
NUM_AT_ONCE = 4
NUM_ECHOED = 8  # tokens of an answer
CHAT = {"messages": [{"role": "user", "content": WORDS}], "temperature": 0}
GETS = ("/health", "/v1/models", "/v1/sessions", "/metrics")


class EchoEngine:
    """The real engine's face; answers every request with the first tokens of its prompt, at once."""

    def __init__(self, engine: EngineFace) -> None:
        self._engine = engine
        self.model_name, self.max_model_len, self.is_alive = engine.model_name, engine.max_model_len, True

    @property
    def sessions(self) -> SessionsFace:
        """Those of the engine: there are none yet."""
        return self._engine.sessions

    def submit(self, request: Request) -> StreamFace:
        """Events of the whole answer."""
        ids = request.prompt_token_ids[:NUM_ECHOED]
        usage = Usage(len(request.prompt_token_ids), 0, len(ids), None)
        stream = RequestStream(request.request_id, lambda *_: None)
        events: list[Event] = [*(Token(0, token_id) for token_id in ids), Finish(0, "length"), Done(usage)]
        deliver([(stream, events)])
        return stream

    async def stop(self, drain_seconds: float) -> None:
        """Nothing runs."""


async def rehearse(app: AsgiApp, api_key: str | None) -> None:
    """Long chats, some at once, streamed and not; then what is asked by operators. `app` is over an `EchoEngine`."""
    for is_streamed in (True, False):
        body = json.dumps({**CHAT, "stream": is_streamed}).encode()
        await asyncio.gather(*(call(app, "POST", "/v1/chat/completions", api_key, body) for _ in range(NUM_AT_ONCE)))
    for path in GETS:
        await call(app, "GET", path, api_key)


async def call(app: AsgiApp, method: str, path: str, api_key: str | None, body: bytes = b"") -> int:
    """One call of an ASGI application, as its server would make it; returns the status."""
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    headers += [(b"content-length", str(len(body)).encode())]
    headers += [(b"authorization", f"Bearer {api_key}".encode())] if api_key else []
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers,
        "client": ("127.0.0.1", 0), "server": ("127.0.0.1", 0),
    }  # fmt: skip
    received, status, is_over = [{"type": "http.request", "body": body}], 0, asyncio.Event()

    async def receive() -> AsgiMessage:
        if received:
            return received.pop()
        await is_over.wait()
        return {"type": "http.disconnect"}

    async def send(message: AsgiMessage) -> None:
        nonlocal status
        status = message.get("status", status)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            is_over.set()

    await app(scope, receive, send)
    return status
