"""Every error as OpenAI's envelope, whoever raised it: ours, the router's, or the validation's."""

from __future__ import annotations

import json
import logging
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from server.api.wire.errors import ErrorEnvelope, ErrorInfo
from server.errors import InvalidRequestError, NotFoundError, ServerError, UnsupportedFieldError

logger = logging.getLogger("server.api")

_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_ROUTER_CODES = {405: "method_not_allowed", 415: "unsupported_media_type"}


def envelope(error: ServerError) -> str:
    """The error as JSON."""
    message = error.message.encode(errors="replace").decode()
    info = ErrorInfo(message=message, type=error.error_type, param=error.param, code=error.code)
    return ErrorEnvelope(error=info).model_dump_json()


def anthropic_envelope(error: ServerError) -> str:
    """The error as Anthropic's protocol has it."""
    message = error.message.encode(errors="replace").decode()
    kind = _ANTHROPIC_TYPES.get(error.status, "api_error")
    return json.dumps({"type": "error", "error": {"type": kind, "message": message}})


def error_response(
    error: ServerError, headers: Mapping[str, str] | None = None, path: str = "", status: int | None = None
) -> Response:
    """The error as an HTTP answer in the protocol of `path`; 429 carries Retry-After, 401 the scheme."""
    named = dict(headers or {})
    if error.retry_after_seconds is not None:
        named["Retry-After"] = str(error.retry_after_seconds)
    if error.status == 401:
        named["WWW-Authenticate"] = "Bearer"
    body = anthropic_envelope(error) if path.startswith("/v1/messages") else envelope(error)
    return Response(body, status or error.status, named, media_type="application/json")


def internal_error(error: BaseException) -> ServerError:
    """What a caller is told about a defect of ours; the log has its kind and place.

    Not its message: libraries quote what they choked on, and that may be somebody's prompt.
    """
    logger.error("unexpected error\n%s", "".join(_places(error)))
    return ServerError("an internal error occurred; the server's log has its cause")


def validation_error(errors: Sequence[Mapping[str, Any]]) -> InvalidRequestError:
    """The first thing that is wrong with a body, naming its field."""
    field = errors[0]["loc"][:2]  # a union reports every member; the one that got furthest was meant
    first = max((error for error in errors if error["loc"][:2] == field), key=lambda error: len(error["loc"]))
    kind, message = str(first["type"]), str(first["msg"]).removeprefix("Value error, ")
    param = _param(first["loc"]) or _quoted(message)
    if kind == "json_invalid":
        return InvalidRequestError(f"the body is not valid JSON: {first.get('ctx', {}).get('error', message)}")
    if kind == "missing" and param is None:
        return InvalidRequestError("a JSON body is needed")
    if kind == "extra_forbidden":
        return UnsupportedFieldError(f"unknown field '{param}'", code="unknown_parameter", param=param)
    if kind == "unsupported_parameter":
        name = first.get("ctx", {}).get("name") or _quoted(message)
        return UnsupportedFieldError(message, param=".".join(filter(None, [_param(first["loc"]), name])))
    return InvalidRequestError(
        f"'{param}': {message}" if param and f"'{param}'" not in message else message, param=param
    )


@contextmanager
def translating() -> Iterator[None]:
    """For one protocol's body put into another's words: what those cannot say is the caller's error, not a defect."""
    try:
        yield
    except ValidationError as error:
        raise validation_error([{**found, "loc": ("body", *found["loc"])} for found in error.errors()]) from None


def install(app: FastAPI) -> None:
    """Registers the handlers."""

    @app.exception_handler(ServerError)
    async def _ours(request: Request, error: ServerError) -> Response:
        return error_response(error, path=request.url.path)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        return error_response(validation_error(error.errors()), path=request.url.path)

    @app.exception_handler(HTTPException)
    async def _router(request: Request, error: HTTPException) -> Response:
        return error_response(
            _router_error(error, f"{request.method} {request.url.path}"),
            error.headers,
            request.url.path,
            status=error.status_code,
        )


def _places(error: BaseException | None) -> Iterator[str]:
    """The stack of an error and of those that led to it, the first one first."""
    if error is None:
        return
    yield from _places(error.__cause__ or (None if error.__suppress_context__ else error.__context__))
    yield from traceback.format_tb(error.__traceback__)
    yield f"{type(error).__module__}.{type(error).__qualname__}\n"


def _router_error(error: HTTPException, call: str) -> ServerError:
    """404, 405 and bodies that are no JSON."""
    kind = NotFoundError if error.status_code == 404 else InvalidRequestError
    return kind(f"{error.detail}: {call}", code=_ROUTER_CODES.get(error.status_code))


def _param(loc: Sequence[str | int]) -> str | None:
    """`messages[0].content` of a pydantic location; names of union members are left out."""
    path = ""
    for part in loc[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif re.fullmatch(r"[a-z_0-9]+", part) and part not in {"str", "int", "float", "bool"}:
            path += f".{part}" if path else part
    return path or None


def _quoted(message: str) -> str | None:
    match = re.search(r"'([a-z_0-9]+)'", message)
    return match.group(1) if match else None
