"""What the OpenAPI document says about answers besides the plain ones."""

from __future__ import annotations

from typing import Any

from server.api.wire.errors import AnthropicErrorEnvelope, ErrorEnvelope

_REASONS = {
    400: "The request is wrong, or asks for something that is not supported; `param` names the field.",
    401: "An API key is needed.",
    404: "There is no such model.",
    413: "The body is too large.",
    429: "Too many requests wait; try again after Retry-After seconds.",
    500: "A defect of the server; its log has the cause.",
    503: "The engine is dead, shutting down or out of memory.",
    504: "The request took longer than --request-timeout.",
}

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorEnvelope, "description": reason} for status, reason in _REASONS.items()
}
SESSION_ERRORS: dict[int | str, dict[str, Any]] = ERRORS | {
    404: {"model": ErrorEnvelope, "description": "There is no such session or model."},
    409: {"model": ErrorEnvelope, "description": "The session's state does not allow it; `code` tells why."},
}
ANTHROPIC_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": AnthropicErrorEnvelope, "description": reason} for status, reason in _REASONS.items()
}
STREAM: dict[str, Any] = {"content": {"text/event-stream": {}}}  # a schema would be of one event, not of the stream
