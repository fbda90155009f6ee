"""What happens to every HTTP call before it is routed: a request id, the API key and its limit, the size of the body.

Plain ASGI, since the framework's own middleware base would hide disconnects from streams.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import uuid
from collections import Counter
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import error_response, internal_error
from server.errors import AuthenticationError, RateLimitError, RequestTooLargeError

REQUEST_ID = "X-Request-Id"
OWNER = b"session-owner"  # at most 16 bytes
_ACCEPTED_ID = re.compile(r"[\x21-\x7e]{1,128}")


class RequestId:
    """Echoes the caller's X-Request-Id, or makes one; `request.state.request_id` holds it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if _ACCEPTED_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class Defects:
    """Answers 500 for an error that nothing has handled. It goes no further: servers log what reaches them, whole."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def noting(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception as error:
            known = internal_error(error)
            if not has_begun:
                await error_response(known, path=scope["path"])(scope, receive, send)


class ApiKeys:
    """Refuses calls without one of the keys, comparing in constant time; `open_paths` need none.

    `request.state.owner` tells keys apart without telling them, and is the same in every process.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], open_paths: Sequence[str] = ()) -> None:
        self._app = app
        self._secret = secrets.token_bytes(32)
        self._digests = [self._digest(key.encode()) for key in keys]
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        key = _given_key(Headers(scope=scope))
        if self._is_allowed(key):
            scope.setdefault("state", {})["owner"] = hashlib.blake2b(key, digest_size=16, person=OWNER).hexdigest()
            await self._app(scope, receive, send)
            return
        error = AuthenticationError("a valid API key is needed: 'Authorization: Bearer KEY'")
        await error_response(error, path=scope["path"])(scope, receive, send)

    def _is_allowed(self, key: bytes) -> bool:
        given = self._digest(key)
        matches = [hmac.compare_digest(given, known) for known in self._digests]  # all of them: constant time
        return any(matches)

    def _digest(self, key: bytes) -> bytes:
        """Of one length whatever the key's, and of no use to another process."""
        return hmac.digest(self._secret, key, hashlib.sha256)


def _given_key(headers: Headers) -> bytes:
    scheme, _, key = headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        key = headers.get("X-Api-Key", "")  # Anthropic's way
    return key.strip().encode("latin-1")


class KeyConcurrency:
    """Refuses a key's next generation while `limit` of them are under way; streams count until they end."""

    RETRY_SECONDS = 1

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit
        self._num_running: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        key = scope["state"]["owner"]  # of the key, however the header spells it; set by ApiKeys, which comes before
        if self._num_running[key] >= self._limit:
            error = RateLimitError(
                f"this key already has {self._limit} requests under way (--max-concurrency-per-key)",
                code="rate_limit_exceeded",
                retry_after_seconds=self.RETRY_SECONDS,
            )
            await error_response(error, path=scope["path"])(scope, receive, send)
            return
        self._num_running[key] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._num_running[key] -= 1
            self._num_running += Counter()  # drops keys at zero


class BodyLimit:
    """Reads the whole body first and refuses it as soon as it is too large."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        body = None if declared.isdigit() and int(declared) > self._max_bytes else await self._read(receive)
        if body is None:
            error = RequestTooLargeError(f"the body exceeds {self._max_bytes} bytes (--max-body-bytes)")
            await error_response(error, {"Connection": "close"}, scope["path"])(scope, receive, send)
            return
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return first.pop() if first else await receive()

        await self._app(scope, replay, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The body, None when it is too large; what is there when the client gives up half-way."""
        parts: list[bytes] = []
        num_bytes = 0
        while True:
            message = await receive()
            parts.append(message.get("body", b""))
            num_bytes += len(parts[-1])
            if num_bytes > self._max_bytes:
                return None
            if not message.get("more_body", False):
                return b"".join(parts)
