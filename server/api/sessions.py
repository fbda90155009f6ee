"""`/v1/sessions`: documents read ahead of any question; sessions listed, pinned, saved, restored, forked, deleted."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response

from server.api import sse
from server.api.caller import CallerDep
from server.api.conversation import encode_conversation
from server.api.disconnect import unless_disconnected
from server.api.documentation import SESSION_ERRORS, STREAM
from server.api.sampling import check_token_ids
from server.api.service import Service, ServiceDep
from server.api.session_objects import progress_event, session_object, session_page
from server.api.streaming import TextOptions
from server.api.wire.base import SessionName
from server.api.wire.chat import ChatMessage
from server.api.wire.sessions import (
    CreateSessionRequest,
    ForkRequest,
    PinRequest,
    SessionDeleted,
    SessionListObject,
    SessionObject,
)
from server.engine.events import Progress
from server.engine.request import Request as EngineRequest
from server.engine.request import SamplingParams
from server.errors import InvalidRequestError

MAX_PAGE = 1000

router = APIRouter(responses=SESSION_ERRORS)

SessionId = Annotated[SessionName, Path(description="The session's name, percent-encoded where it must be.")]


@router.get("/v1/sessions")
async def list_sessions(
    service: ServiceDep,
    caller: CallerDep,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
    after: Annotated[SessionName | None, Query(description="The last `id` of the page before.")] = None,
) -> SessionListObject:
    """The caller's sessions, last used first."""
    return session_page(await service.engine.sessions.list(caller.owner, caller.salt(), limit, after))


@router.post(
    "/v1/sessions",
    responses={
        200: {"model": SessionObject, **STREAM},
        202: {
            "model": SessionObject,
            "description": "With `background`: queued; GET tells how far it is.",
        },
    },
)
async def create_session(body: CreateSessionRequest, http: Request, service: ServiceDep, caller: CallerDep) -> Response:
    """Reads a document, so that questions over it need not wait; the session's name is the `prompt_cache_key`."""
    service.check_model(body.model)
    name = body.id or caller.session or _new_name()
    request = EngineRequest(
        request_id=f"prefill-{uuid.uuid4().hex}",
        prompt_token_ids=await _token_ids(body, service),
        sampling=SamplingParams(max_tokens=0, temperature=0.0),
        session_id=name,
        session_owner=caller.owner,
        cache_salt=caller.salt(body.cache_salt),
        priority=body.priority or 0,
    )
    key = caller.key(name, body.cache_salt)
    if body.background:
        service.engine.submit(request)
        session = session_object(await service.engine.sessions.get(key))
        return Response(session.model_dump_json(), 202, media_type="application/json")

    async def events() -> AsyncGenerator[str]:
        async with aclosing(_prefill(request, service)) as updates:
            async for progress in updates:
                yield sse.event(progress_event(name, progress))
        yield sse.event(session_object(await service.engine.sessions.get(key)))
        yield sse.DONE

    async def wait() -> Response:
        async with aclosing(_prefill(request, service)) as updates:
            async for _ in updates:
                pass
        session = session_object(await service.engine.sessions.get(key))
        return Response(session.model_dump_json(), media_type="application/json")

    if body.stream:
        return sse.EventStream(events(), service.keepalive_seconds)
    return await unless_disconnected(http, wait())


@router.post("/v1/sessions/{session_id:path}/pin")
async def pin_session(
    session_id: SessionId, service: ServiceDep, caller: CallerDep, body: PinRequest | None = None
) -> SessionObject:
    """Keeps the session's context in memory for `ttl_seconds`; what it grows by stays too."""
    return session_object(await service.engine.sessions.pin(caller.key(session_id), body.ttl_seconds if body else None))


@router.post("/v1/sessions/{session_id:path}/save")
async def save_session(session_id: SessionId, service: ServiceDep, caller: CallerDep) -> SessionObject:
    """Writes K, V, indexes and the session's name to disk; answers when they are there."""
    return session_object(await service.engine.sessions.save(caller.key(session_id)))


@router.post("/v1/sessions/{session_id:path}/restore")
async def restore_session(session_id: SessionId, service: ServiceDep, caller: CallerDep) -> SessionObject:
    """Brings a session back from disk into memory."""
    return session_object(await service.engine.sessions.restore(caller.key(session_id)))


@router.post("/v1/sessions/{session_id:path}/fork")
async def fork_session(
    session_id: SessionId, service: ServiceDep, caller: CallerDep, body: ForkRequest | None = None
) -> SessionObject:
    """A new session over the same context, of which both hold the same bytes."""
    name = (body.id if body else None) or _new_name()
    return session_object(await service.engine.sessions.fork(caller.key(session_id), name))


@router.get("/v1/sessions/{session_id:path}")
async def get_session(session_id: SessionId, service: ServiceDep, caller: CallerDep) -> SessionObject:
    """One session."""
    return session_object(await service.engine.sessions.get(caller.key(session_id)))


@router.delete("/v1/sessions/{session_id:path}")
async def delete_session(session_id: SessionId, service: ServiceDep, caller: CallerDep) -> SessionDeleted:
    """Forgets a session, its files, and the memory that no other session and no running request needs."""
    freed = await service.engine.sessions.delete(caller.key(session_id))
    return SessionDeleted(id=session_id, freed_bytes=freed)


def _new_name() -> str:
    return f"sess_{uuid.uuid4().hex}"


async def _token_ids(body: CreateSessionRequest, service: Service) -> tuple[int, ...]:
    """The beginning of every later prompt over this document."""
    if body.messages is not None:
        token_ids = await _conversation_prefix(body, body.messages, service)
    elif isinstance(body.prompt, str):
        token_ids = await service.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    else:
        check_token_ids(body.prompt or [], service, "prompt")
        token_ids = tuple(body.prompt or [])
    if not token_ids:
        raise InvalidRequestError("the prompt is empty", param="prompt")
    return token_ids


async def _conversation_prefix(
    body: CreateSessionRequest, messages: list[ChatMessage], service: Service
) -> tuple[int, ...]:
    """The conversation up to the end of its last message.

    Some templates render nothing without a user's turn: there, what two conversations that go on differently share.
    """

    async def encode(more: list[ChatMessage]) -> tuple[int, ...]:
        return await encode_conversation(
            [*messages, *more],
            service.tokenizer,
            tools=body.tools or [],
            add_generation_prompt=False,
            add_special_tokens=bool(body.add_special_tokens),
            template_kwargs=body.chat_template_kwargs,
        )

    try:
        return await encode([])
    except InvalidRequestError as refusal:
        try:
            first, second = [await encode([ChatMessage(role="user", content=text)]) for text in ("a", "b")]
        except InvalidRequestError:
            raise refusal from None
        num_shared = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(first))
        return first[:num_shared]


async def _prefill(request: EngineRequest, service: Service) -> AsyncGenerator[Progress]:
    """Progress until the prompt is read."""
    async with aclosing(service.generate([request], TextOptions())) as updates:
        async for update in updates:
            if isinstance(update, Progress):
                yield update
