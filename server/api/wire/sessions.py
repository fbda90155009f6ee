"""`/v1/sessions`: requests, and sessions as they are shown."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from server.api.wire.base import Name, SessionName, Text, WireRequest, WireResponse
from server.api.wire.chat import ChatMessage, TemplateKwargs
from server.api.wire.completions import TokenIds
from server.api.wire.generation import INT64
from server.api.wire.tools import Tools
from server.engine.session_info import SessionState

MAX_TTL_SECONDS = 10 * 365 * 86400


class CreateSessionRequest(WireRequest):
    """A document to read ahead of any question: exactly one of `prompt` and `messages`."""

    id: SessionName | None = None
    model: Name | None = None
    prompt: Text | TokenIds | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    tools: Tools | None = None
    add_special_tokens: bool | None = None  # as the endpoints have it: true for a prompt, false for messages
    chat_template_kwargs: TemplateKwargs | None = None
    cache_salt: Name | None = None
    priority: int | None = Field(None, ge=-INT64, lt=INT64)
    stream: bool | None = None
    background: bool | None = None

    @model_validator(mode="after")
    def _check_create(self) -> CreateSessionRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("exactly one of 'prompt' and 'messages' is needed")
        if self.tools and self.messages is None:
            raise ValueError("'tools' needs 'messages'")
        if self.stream and self.background:
            raise ValueError("'stream' and 'background' exclude each other")
        return self


class PinRequest(WireRequest):
    """How long a session stays in memory whatever else runs: null until it is unpinned, 0 no longer."""

    ttl_seconds: Annotated[float, Field(ge=0, le=MAX_TTL_SECONDS)] | None = None


class ForkRequest(WireRequest):
    """The name of the new session; one is made when there is none."""

    id: SessionName | None = None


class TierBytes(WireResponse):
    """Bytes by tier. `own` and `shared` divide `host_kv` and `host_index`; `tail` is of requests that run now."""

    host_kv: int
    host_index: int
    tail: int
    disk: int
    own: int
    shared: int


class PrefillProgress(WireResponse):
    """How far the prompt of a running request is read."""

    prefilled_tokens: int
    prompt_tokens: int


class SessionObject(WireResponse):
    """One session. Times are seconds since 1970."""

    id: str
    object: Literal["session"] = "session"
    created_at: int
    last_used_at: int
    state: SessionState
    tokens: int
    tokens_in_memory: int
    prefill: PrefillProgress | None
    index_progress: float
    requests: int
    running_requests: int
    hits: int
    cached_tokens: int
    pinned: bool
    pin_expires_at: int | None
    saved_at: int | None
    bytes: TierBytes
    error: str | None


class SessionListObject(WireResponse):
    """A page of sessions, last used first, and what they hold together; `total` counts those on all pages."""

    object: Literal["list"] = "list"
    data: list[SessionObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
    total: int
    bytes: TierBytes


class SessionProgress(WireResponse):
    """An event of a streamed prefill; the last one is the session itself."""

    id: str
    object: Literal["session.progress"] = "session.progress"
    prefilled_tokens: int
    prompt_tokens: int


class SessionDeleted(WireResponse):
    """What went."""

    id: str
    object: Literal["session.deleted"] = "session.deleted"
    deleted: Literal[True] = True
    freed_bytes: int
