"""`POST /v1/chat/completions`: messages in, one message per choice out, at once or as a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import APIRouter, Header, Request, Response

from server.api import sse
from server.api.collected import Collected
from server.api.disconnect import unless_disconnected
from server.api.documentation import ERRORS, STREAM
from server.api.logprobs import chat_logprobs
from server.api.sampling import engine_request, text_options
from server.api.service import Service, ServiceDep
from server.api.streaming import Delta, TextUsage, Update
from server.api.structure import constraint
from server.api.usage import usage_info
from server.api.wire.base import Name
from server.api.wire.chat import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatMessage,
    ChatRequest,
    ChatResponse,
    ChunkChoice,
)
from server.api.wire.chat import Delta as WireDelta
from server.api.wire.generation import UsageInfo
from server.engine.events import Progress
from server.engine.request import Request as EngineRequest
from server.engine.tokenizer import Tokenizer

router = APIRouter()


@router.post("/v1/chat/completions", responses={200: {"model": ChatResponse, **STREAM}, **ERRORS})
async def create_chat_completion(
    body: ChatRequest, http: Request, service: ServiceDep, x_session_id: Annotated[Name | None, Header()] = None
) -> Response:
    """Answers a conversation."""
    call = ChatCall(body, service, service.check_model(body.model))
    request = await call.engine_request(x_session_id)
    updates = service.generate([request], text_options(body))
    if body.stream:
        return sse.EventStream(call.stream(updates), service.keepalive_seconds)
    return await unless_disconnected(http, call.collect(updates))


@dataclass(slots=True)
class ChatCall:
    """One call: what its answer repeats in every part."""

    body: ChatRequest
    service: Service
    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    async def engine_request(self, session_header: str | None) -> EngineRequest:
        """Renders and encodes the messages."""
        prompt = await self.service.tokenizer.encode_chat(
            template_messages(self.body.messages, self.service.tokenizer),
            add_generation_prompt=self.body.add_generation_prompt,
            continue_final_message=self.body.continue_final_message,
            add_special_tokens=bool(self.body.add_special_tokens),
            template_kwargs=self.body.chat_template_kwargs,
        )
        make_constraint = await constraint(self.body, self.service)
        return engine_request(self.body, prompt, self.id, self.service, session_header, make_constraint)

    async def collect(self, updates: AsyncGenerator[Update]) -> Response:
        """The whole answer as one JSON document."""
        choices = [Collected() for _ in range(self.body.n or 1)]
        async with aclosing(updates):
            async for update in updates:
                if isinstance(update, Delta):
                    choices[update.choice].add(update)
                elif isinstance(update, TextUsage):
                    usage = usage_info(update)
        answer = ChatResponse(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=[self._choice(index, choice) for index, choice in enumerate(choices)],
            usage=usage,
        )
        return Response(answer.model_dump_json(), media_type="application/json")

    async def stream(self, updates: AsyncGenerator[Update]) -> AsyncGenerator[str]:
        """The answer as events: the role, the text in pieces, the finish reason, the usage when asked for."""
        has_usage = self.body.stream_options is not None and self.body.stream_options.include_usage
        has_begun = False
        async with aclosing(updates):
            async for update in updates:
                if not has_begun and not isinstance(update, Progress):
                    has_begun = True
                    for index in range(self.body.n or 1):
                        yield self._event([_role_choice(index)], has_usage)
                match update:
                    case Progress():
                        yield sse.comment(update)
                    case Delta():
                        for choice in self._chunk_choices(update):
                            yield self._event([choice], has_usage)
                    case TextUsage() if has_usage:
                        yield sse.event(self._chunk([], usage=usage_info(update)))
        yield sse.DONE

    def _choice(self, index: int, collected: Collected) -> ChatChoice:
        return ChatChoice(
            index=index,
            message=AnswerMessage(content=collected.text),
            logprobs=chat_logprobs(collected.tokens, self.service.tokenizer) if self.body.logprobs else None,
            finish_reason=collected.finish_reason,
            stop_reason=collected.stop_reason,
        )

    def _chunk_choices(self, delta: Delta) -> list[ChunkChoice]:
        choices = []
        if delta.text or delta.tokens:
            logprobs = chat_logprobs(delta.tokens, self.service.tokenizer) if self.body.logprobs else None
            piece = WireDelta(content=delta.text)
            choices.append(ChunkChoice(index=delta.choice, delta=piece, logprobs=logprobs, finish_reason=None))
        if delta.finish_reason is not None:
            choices.append(
                ChunkChoice(
                    index=delta.choice,
                    delta=WireDelta(),
                    logprobs=None,
                    finish_reason=delta.finish_reason,
                    stop_reason=delta.stop_reason,
                )
            )
        return choices

    def _event(self, choices: list[ChunkChoice], has_usage: bool) -> str:
        return sse.event(self._chunk(choices, usage=None) if has_usage else self._chunk(choices))

    def _chunk(self, choices: list[ChunkChoice], **usage: UsageInfo | None) -> ChatChunk:
        """`usage` is written when given, even as null."""
        return ChatChunk(
            id=self.id, object="chat.completion.chunk", created=self.created, model=self.model, choices=choices, **usage
        )


def template_messages(messages: Sequence[ChatMessage], tokenizer: Tokenizer) -> list[dict[str, str]]:
    """Messages as chat templates expect them; `developer` becomes `system` where a template does not know it."""
    return [_template_message(message, tokenizer.knows_developer_role) for message in messages]


def _template_message(message: ChatMessage, knows_developer: bool) -> dict[str, str]:
    role = "system" if message.role == "developer" and not knows_developer else message.role
    optional = {"name": message.name, "tool_call_id": message.tool_call_id}
    given = {name: value for name, value in optional.items() if value is not None}
    return {"role": role, "content": message.text, **given}


def _role_choice(index: int) -> ChunkChoice:
    return ChunkChoice(index=index, delta=WireDelta(role="assistant", content=""), logprobs=None, finish_reason=None)
