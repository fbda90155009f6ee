"""`POST /v1/chat/completions`: messages in, one message per choice out, at once or as a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field

from fastapi import APIRouter, Request, Response

from server.api import sse
from server.api.caller import CallerDep
from server.api.disconnect import unless_disconnected
from server.api.documentation import ERRORS, STREAM
from server.api.json_answer import json_response
from server.api.logprobs import chat_logprobs, prompt_logprobs
from server.api.parts.base import CallArguments, CallStart, Content, Part, Reasoning
from server.api.service import ServiceDep
from server.api.streaming import TextUsage
from server.api.turn import CollectedTurn, Turn, TurnDelta, collect, new_call_id, prepare
from server.api.usage import usage_info, usage_so_far
from server.api.wire.chat import AnswerMessage, ChatChoice, ChatChunk, ChatRequest, ChatResponse, ChunkChoice
from server.api.wire.chat import Delta as WireDelta
from server.api.wire.generation import UsageInfo
from server.api.wire.tools import AnswerFunction, AnswerToolCall, ToolCallDelta
from server.engine.events import Progress

router = APIRouter()


@router.post("/v1/chat/completions", responses={200: {"model": ChatResponse, **STREAM}, **ERRORS})
async def create_chat_completion(body: ChatRequest, http: Request, service: ServiceDep, caller: CallerDep) -> Response:
    """Answers a conversation."""
    model = service.check_model(body.model)
    completion_id = f"chatcmpl-{uuid.uuid4().hex}"
    answer = ChatAnswer(await prepare(body, service, completion_id, caller), completion_id, model)
    if body.stream:
        return sse.EventStream(answer.stream(), service.keepalive_seconds)
    return await unless_disconnected(http, answer.collect())


@dataclass(slots=True)
class ChatAnswer:
    """One answer: what it repeats in every chunk."""

    turn: Turn
    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    async def collect(self) -> Response:
        """The whole answer as one JSON document."""
        whole = await collect(self.turn)
        answer = ChatResponse(
            id=self.id,
            object="chat.completion",
            created=self.created,
            model=self.model,
            choices=[self._choice(index, choice) for index, choice in enumerate(whole.choices)],
            usage=usage_info(whole.usage),
        )
        is_scored = self.turn.body.prompt_logprobs is not None
        if is_scored:
            answer.prompt_logprobs = await prompt_logprobs(whole.prompt_scores, self.turn.service.tokenizer)
        return await json_response(answer, is_large=is_scored, exclude_unset=True)

    async def stream(self) -> AsyncGenerator[str]:
        """The answer as events: the role, the parts as they come, the finish reason, the usage when asked for."""
        has_begun = False
        texts = [self._text_events(index) for index in range(self.turn.request.sampling.n)]
        tells_usage = self.turn.body.has_usage_throughout
        async with aclosing(self.turn.run()) as updates:
            async for update in updates:
                if not has_begun and not isinstance(update, Progress):
                    has_begun = True
                    for index in range(self.turn.request.sampling.n):
                        yield self._event(_role_choice(index), 0)
                        if self.echo:
                            yield self._event(_text_choice(index, self.echo), 0)
                match update:
                    case Progress():
                        yield sse.comment(update)
                    case TurnDelta(index, (Content(text),), (), None) if not tells_usage:  # nearly all of them
                        yield texts[index].render(text)
                    case TurnDelta():
                        for choice in self._chunk_choices(update):
                            yield self._event(choice, update.num_tokens)
                    case TextUsage() if self.turn.body.has_usage:
                        yield sse.event(self._chunk([], usage=usage_info(update)))
        yield sse.DONE

    def _choice(self, index: int, collected: CollectedTurn) -> ChatChoice:
        tokenizer = self.turn.service.tokenizer
        return ChatChoice(
            index=index,
            message=_message(collected, self.echo),
            logprobs=chat_logprobs(collected.tokens, tokenizer) if self.turn.body.logprobs else None,
            finish_reason=collected.finish_reason,
            stop_reason=collected.stop_reason,
        )

    def _chunk_choices(self, delta: TurnDelta) -> Iterator[ChunkChoice]:
        """One per part; the first one carries the log-probabilities, the last one the finish reason."""
        tokens = delta.tokens
        parts = [_part_delta(part) for part in delta.parts] or ([WireDelta(content="")] if tokens else [])
        for part in parts:
            logprobs = chat_logprobs(tokens, self.turn.service.tokenizer) if self.turn.body.logprobs else None
            yield ChunkChoice(index=delta.choice, delta=part, logprobs=logprobs, finish_reason=None)
            tokens = ()
        if delta.finish_reason is not None:
            yield ChunkChoice(
                index=delta.choice,
                delta=WireDelta(),
                logprobs=None,
                finish_reason=delta.finish_reason,
                stop_reason=delta.stop_reason,
            )

    def _text_events(self, index: int) -> sse.TextEvents:
        choice = _text_choice(index, sse.TextEvents.MARK)
        return sse.TextEvents(self._chunk([choice], usage=None) if self.turn.body.has_usage else self._chunk([choice]))

    def _event(self, choice: ChunkChoice, num_tokens: int) -> str:
        body = self.turn.body
        if not body.has_usage:
            return sse.event(self._chunk([choice]))
        num_prompt_tokens = len(self.turn.request.prompt_token_ids)
        usage = usage_so_far(num_prompt_tokens, num_tokens) if body.has_usage_throughout else None
        return sse.event(self._chunk([choice], usage=usage))

    @property
    def echo(self) -> str:
        """What stands before the answer: the message it goes on with, as vLLM's `echo` has it."""
        last = self.turn.body.messages[-1]
        return last.text if self.turn.body.echo and last.role == "assistant" else ""

    def _chunk(self, choices: list[ChunkChoice], **usage: UsageInfo | None) -> ChatChunk:
        """`usage` is written when given, even as null."""
        return ChatChunk(
            id=self.id, object="chat.completion.chunk", created=self.created, model=self.model, choices=choices, **usage
        )


def _message(collected: CollectedTurn, echo: str) -> AnswerMessage:
    """Content is null when there is nothing but calls, as in OpenAI's API; other fields stand only when filled."""
    content = echo + collected.content
    has_content = bool(content.strip()) or not collected.calls
    message = AnswerMessage(role="assistant", content=content if has_content else None, refusal=None)
    if collected.reasoning:
        message.reasoning_content = collected.reasoning
    if collected.calls:
        message.tool_calls = [
            AnswerToolCall(
                id=call.id, type="function", function=AnswerFunction(name=call.name, arguments=call.arguments)
            )
            for call in collected.calls
        ]
    return message


def _part_delta(part: Part) -> WireDelta:
    match part:
        case Content(text):
            return WireDelta(content=text)
        case Reasoning(text):
            return WireDelta(reasoning_content=text)
        case CallStart(call, name):
            function = AnswerFunction(name=name, arguments="")
            return WireDelta(
                tool_calls=[ToolCallDelta(index=call, id=new_call_id(), type="function", function=function)]
            )
        case CallArguments(call, text):
            return WireDelta(tool_calls=[ToolCallDelta(index=call, function=AnswerFunction(arguments=text))])


def _role_choice(index: int) -> ChunkChoice:
    return ChunkChoice(index=index, delta=WireDelta(role="assistant", content=""), logprobs=None, finish_reason=None)


def _text_choice(index: int, text: str) -> ChunkChoice:
    return ChunkChoice(index=index, delta=WireDelta(content=text), logprobs=None, finish_reason=None)
