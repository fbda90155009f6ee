"""`POST /v1/messages`: Anthropic's protocol, a thin translation to a turn of a conversation and back."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response

from server.api import sse
from server.api.caller import Caller, CallerDep
from server.api.disconnect import unless_disconnected
from server.api.documentation import ANTHROPIC_ERRORS, STREAM
from server.api.errors import translating
from server.api.message_blocks import Blocks, content_blocks
from server.api.service import ServiceDep
from server.api.streaming import TextUsage
from server.api.turn import Turn, TurnDelta, collect, prepare
from server.api.wire.chat import ChatMessage, ChatRequest
from server.api.wire.messages import (
    AnyBlock,
    CountTokensRequest,
    CountTokensResponse,
    InputTool,
    InputToolChoice,
    InputTurn,
    MessagesRequest,
    MessagesResponse,
    MessagesUsage,
    PromptRequest,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from server.api.wire.tools import CalledFunction, Function, NamedFunction, NamedToolChoice, Tool, ToolCall, ToolChoice
from server.engine.events import Progress
from server.errors import InvalidRequestError

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}

router = APIRouter()


@router.post("/v1/messages", responses={200: {"model": MessagesResponse, **STREAM}, **ANTHROPIC_ERRORS})
async def create_message(body: MessagesRequest, http: Request, service: ServiceDep, caller: CallerDep) -> Response:
    """Answers a conversation, in Anthropic's protocol."""
    model = service.check_model(body.model)
    message_id = f"msg_{uuid.uuid4().hex}"
    with translating():
        chat = chat_request(body)
    answer = MessageAnswer(await prepare(chat, service, message_id, caller), model)
    if body.stream:
        return sse.EventStream(answer.stream(), service.keepalive_seconds, sse.anthropic_error)
    return await unless_disconnected(http, answer.collect())


@router.post("/v1/messages/count_tokens", responses=ANTHROPIC_ERRORS)
async def count_tokens(body: CountTokensRequest, service: ServiceDep) -> CountTokensResponse:
    """How many tokens the prompt of such a message has."""
    service.check_model(body.model)
    with translating():
        chat = _prompt(body)
    turn = await prepare(chat, service, "count", Caller())
    return CountTokensResponse(input_tokens=len(turn.request.prompt_token_ids))


class MessageAnswer:
    """One answer."""

    def __init__(self, turn: Turn, model: str) -> None:
        self._turn = turn
        self._model = model

    async def collect(self) -> Response:
        """The whole answer as one JSON document."""
        whole = await collect(self._turn)
        (choice,) = whole.choices
        message = self._message(
            content_blocks(choice), choice.finish_reason, choice.stop_reason, len(choice.calls), _usage(whole.usage)
        )
        return Response(message.model_dump_json(), media_type="application/json")

    async def stream(self) -> AsyncGenerator[str]:
        """Typed events, from `message_start` to `message_stop`."""
        blocks, has_begun, last = Blocks(), False, TurnDelta(0, ())
        async with aclosing(self._turn.run()) as updates:
            async for update in updates:
                if not has_begun:
                    has_begun = True
                    yield _event("message_start", {"message": self._message([], None, None, 0, self._start_usage())})
                match update:
                    case Progress():
                        yield sse.comment(update)
                    case TurnDelta():
                        last = update
                        for name, fields in blocks.take(update.parts, is_last=update.finish_reason is not None):
                            yield _event(name, fields)
                    case TextUsage():
                        message = self._message(
                            [], last.finish_reason, last.stop_reason, blocks.num_calls, _usage(update)
                        )
                        for event in _end(message):
                            yield event

    def _message(
        self,
        content: list[dict[str, Any]],
        finish_reason: str | None,
        stop_reason: int | str | None,
        num_calls: int,
        usage: MessagesUsage,
    ) -> MessagesResponse:
        stop_sequence = stop_reason if isinstance(stop_reason, str) else None
        reason = STOP_REASONS.get(finish_reason, finish_reason) if finish_reason else None
        if num_calls and reason == "end_turn":  # of a named tool
            reason = "tool_use"
        return MessagesResponse(
            id=self._turn.request.request_id,
            model=self._model,
            content=content,
            stop_reason="stop_sequence" if stop_sequence is not None else reason,
            stop_sequence=stop_sequence,
            usage=usage,
        )

    def _start_usage(self) -> MessagesUsage:
        return MessagesUsage(input_tokens=len(self._turn.request.prompt_token_ids), output_tokens=0)


def chat_request(body: MessagesRequest) -> ChatRequest:
    """The same request in chat's words."""
    fields = {
        "max_tokens": body.max_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "stop": body.stop_sequences,
    }
    return _prompt(body).model_copy(update=fields)


def _prompt(body: PromptRequest) -> ChatRequest:
    system = body.system if isinstance(body.system, str) else _text(body.system or [])
    first = [ChatMessage(role="system", content=system)] if system else []
    choice = body.tool_choice
    return ChatRequest(
        messages=[*first, *(message for turn in body.messages for message in _turn_messages(turn))],
        tools=[_tool(tool) for tool in body.tools] if body.tools else None,
        tool_choice=_choice(choice) if choice else None,
        parallel_tool_calls=not choice.disable_parallel_tool_use if choice else None,
    )


def _turn_messages(turn: InputTurn) -> Iterator[ChatMessage]:
    """Results of calls are messages of their own; what the user adds comes after them."""
    if isinstance(turn.content, str):
        yield ChatMessage(role=turn.role, content=turn.content)
        return
    for block in turn.content:
        if isinstance(block, ToolResultBlock):
            content = block.content if isinstance(block.content, str) else _text(block.content or [])
            yield ChatMessage(role="tool", tool_call_id=block.tool_use_id, content=content)
    rest = [block for block in turn.content if not isinstance(block, ToolResultBlock)]
    if rest or not turn.content:
        yield _block_message(turn.role, rest)


def _block_message(role: Any, blocks: Sequence[AnyBlock]) -> ChatMessage:
    calls = [
        ToolCall(id=block.id, function=CalledFunction(name=block.name, arguments=json.dumps(block.input)))
        for block in blocks
        if isinstance(block, ToolUseBlock)
    ]
    thoughts = "".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock))
    text = _text([block for block in blocks if isinstance(block, TextBlock)])
    return ChatMessage(role=role, content=text, tool_calls=calls or None, reasoning_content=thoughts or None)


def _text(blocks: Sequence[TextBlock]) -> str:
    return "\n".join(block.text for block in blocks)


def _tool(tool: InputTool) -> Tool:
    function = Function(name=tool.name, description=tool.description, parameters=tool.input_schema)
    return Tool(type="function", function=function)


def _choice(choice: InputToolChoice) -> ToolChoice:
    if choice.type == "tool":
        if choice.name is None:
            raise InvalidRequestError("'tool_choice' of type 'tool' needs a 'name'", param="tool_choice.name")
        return NamedToolChoice(type="function", function=NamedFunction(name=choice.name))
    return "required" if choice.type == "any" else choice.type


def _usage(usage: TextUsage) -> MessagesUsage:
    return MessagesUsage(
        input_tokens=usage.num_prompt_tokens - usage.num_cached_tokens,
        output_tokens=usage.num_generated_tokens,
        cache_read_input_tokens=usage.num_cached_tokens,
    )


def _event(name: str, fields: dict[str, Any]) -> str:
    shown = {key: value.model_dump() if hasattr(value, "model_dump") else value for key, value in fields.items()}
    return sse.named_event(name, {"type": name, **shown})


def _end(message: MessagesResponse) -> Iterator[str]:
    delta = {"stop_reason": message.stop_reason, "stop_sequence": message.stop_sequence}
    yield _event("message_delta", {"delta": delta, "usage": message.usage})
    yield _event("message_stop", {})
