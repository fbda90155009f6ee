"""OpenAI's error envelope."""

from __future__ import annotations

from typing import Literal

from server.api.wire.base import WireResponse


class ErrorInfo(WireResponse):
    """What went wrong: `param` names the field, `code` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(WireResponse):
    """Body of every answer that is not a success."""

    error: ErrorInfo


class AnthropicErrorInfo(WireResponse):
    """What went wrong, in Anthropic's protocol."""

    type: str
    message: str


class AnthropicErrorEnvelope(WireResponse):
    """Body of every answer under `/v1/messages` that is not a success."""

    type: Literal["error"]
    error: AnthropicErrorInfo
