"""`POST /v1/responses`: a thin translation to a turn of a conversation and back. Nothing is stored."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response

from server.api import sse
from server.api.caller import CallerDep
from server.api.disconnect import unless_disconnected
from server.api.documentation import ERRORS, STREAM
from server.api.errors import translating
from server.api.response_items import Items
from server.api.service import ServiceDep
from server.api.streaming import TextUsage
from server.api.turn import Turn, TurnDelta, prepare
from server.api.wire.chat import ChatMessage, ChatRequest
from server.api.wire.responses import (
    FunctionCall,
    FunctionCallOutput,
    FunctionChoice,
    InputMessage,
    InputText,
    InputTokensDetails,
    OutputTokensDetails,
    ReasoningItem,
    ResponsesRequest,
    ResponsesResponse,
    ResponsesUsage,
    SchemaFormat,
)
from server.api.wire.structure import JsonSchemaFormat, NamedSchema, ResponseFormat
from server.api.wire.tools import CalledFunction, Function, NamedFunction, NamedToolChoice, Tool, ToolCall, ToolChoice
from server.engine.events import Progress
from server.errors import InvalidRequestError

router = APIRouter()


@router.post("/v1/responses", responses={200: {"model": ResponsesResponse, **STREAM}, **ERRORS})
async def create_response(body: ResponsesRequest, http: Request, service: ServiceDep, caller: CallerDep) -> Response:
    """Answers a conversation, in the newer protocol."""
    model = service.check_model(body.model)
    response_id = f"resp_{uuid.uuid4().hex}"
    with translating():
        chat = chat_request(body)
    answer = ResponseAnswer(body, await prepare(chat, service, response_id, caller), model)
    if body.stream:
        return sse.EventStream(answer.stream(), service.keepalive_seconds, sse.named_error)
    return await unless_disconnected(http, answer.collect())


class ResponseAnswer:
    """One answer and the number of its next event."""

    def __init__(self, body: ResponsesRequest, turn: Turn, model: str) -> None:
        self._body = body
        self._turn = turn
        self._model = model
        self._created = int(time.time())
        self._items = Items()
        self._num_events = 0

    async def collect(self) -> Response:
        """The whole answer as one JSON document: the last event of the stream."""
        last = self._response("in_progress")
        async for _, response in self._run():
            last = response
        return Response(last.model_dump_json(), media_type="application/json")

    async def stream(self) -> AsyncGenerator[str]:
        """Typed events; the last one is `response.completed` or `response.incomplete`."""
        async for text, _ in self._run():
            yield text

    async def _run(self) -> AsyncGenerator[tuple[str, ResponsesResponse]]:
        """Every event, with the response as it stands then."""
        response = self._response("in_progress")
        has_begun, reason = False, "stop"
        async with aclosing(self._turn.run()) as updates:
            async for update in updates:
                if not has_begun:
                    has_begun = True
                    yield self._lifecycle("response.created", response), response
                    yield self._lifecycle("response.in_progress", response), response
                match update:
                    case Progress():
                        yield sse.comment(update), response
                    case TurnDelta():
                        reason = update.finish_reason or reason
                        for name, fields in self._items.take(update.parts, is_last=update.finish_reason is not None):
                            yield self._event(name, fields), response
                    case TextUsage():
                        status = "incomplete" if reason == "length" else "completed"
                        response = self._response(status, update)
                        yield self._lifecycle(f"response.{status}", response), response

    def _lifecycle(self, name: str, response: ResponsesResponse) -> str:
        return self._event(name, {"response": response.model_dump()})

    def _event(self, name: str, fields: dict[str, Any]) -> str:
        number, self._num_events = self._num_events, self._num_events + 1
        return sse.named_event(name, {"type": name, "sequence_number": number, **fields})

    def _response(self, status: Any, usage: TextUsage | None = None) -> ResponsesResponse:
        body, sampling = self._body, self._turn.request.sampling
        return ResponsesResponse(
            id=self._turn.request.request_id,
            created_at=self._created,
            status=status,
            model=self._model,
            output=self._items.done,
            incomplete_details={"reason": "max_output_tokens"} if status == "incomplete" else None,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            parallel_tool_calls=body.parallel_tool_calls is not False,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            tool_choice=_shown(body.tool_choice) or "auto",
            tools=[tool.model_dump() for tool in body.tools or []],
            text={"format": _shown(body.text.format) if body.text and body.text.format else {"type": "text"}},
            usage=_usage(usage) if usage else None,
            user=body.user,
        )


def chat_request(body: ResponsesRequest) -> ChatRequest:
    """The same request in chat's words."""
    messages = _messages(body)
    if not messages:
        raise InvalidRequestError("'input' holds no message", param="input")
    return ChatRequest(
        messages=messages,
        max_completion_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        response_format=_format(body),
        tools=[_tool(tool) for tool in body.tools] if body.tools is not None else None,
        tool_choice=_choice(body),
        parallel_tool_calls=body.parallel_tool_calls,
        user=body.user,
        prompt_cache_key=body.prompt_cache_key,
    )


def _messages(body: ResponsesRequest) -> list[ChatMessage]:
    """Calls and reasoning that stand side by side belong to one assistant message."""
    messages = [ChatMessage(role="system", content=body.instructions)] if body.instructions else []
    if isinstance(body.input, str):
        return [*messages, ChatMessage(role="user", content=body.input)]
    calls: list[ToolCall] = []
    thoughts = ""
    for item in body.input:
        match item:
            case ReasoningItem():
                thoughts += "".join(part.text for part in [*item.summary, *(item.content or [])])
            case FunctionCall():
                function = CalledFunction(name=item.name, arguments=item.arguments)
                calls.append(ToolCall(id=item.call_id, function=function))
            case InputMessage(role="assistant") if not calls:
                messages.append(
                    ChatMessage(role="assistant", content=_text(item.content), reasoning_content=thoughts or None)
                )
                thoughts = ""
            case InputMessage() | FunctionCallOutput():
                messages += _pending(calls, thoughts)
                calls, thoughts = [], ""
                messages.append(_message(item))
    return messages + _pending(calls, thoughts)


def _pending(calls: list[ToolCall], thoughts: str) -> list[ChatMessage]:
    if not calls and not thoughts:
        return []
    return [ChatMessage(role="assistant", tool_calls=calls or None, reasoning_content=thoughts or None)]


def _message(item: InputMessage | FunctionCallOutput) -> ChatMessage:
    if isinstance(item, FunctionCallOutput):
        return ChatMessage(role="tool", tool_call_id=item.call_id, content=_text(item.output))
    return ChatMessage(role=item.role, content=_text(item.content))


def _text(content: str | Sequence[InputText]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _format(body: ResponsesRequest) -> ResponseFormat | None:
    wanted = body.text.format if body.text else None
    if not isinstance(wanted, SchemaFormat):
        return wanted
    return JsonSchemaFormat(
        type="json_schema", json_schema=NamedSchema.model_validate({"name": wanted.name, "schema": wanted.json_schema})
    )


def _tool(tool: Any) -> Tool:
    function = Function(name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict)
    return Tool(type="function", function=function)


def _choice(body: ResponsesRequest) -> ToolChoice | None:
    if isinstance(body.tool_choice, FunctionChoice):
        return NamedToolChoice(type="function", function=NamedFunction(name=body.tool_choice.name))
    return body.tool_choice


def _shown(value: Any) -> Any:
    return value.model_dump(by_alias=True, exclude_none=True) if hasattr(value, "model_dump") else value


def _usage(usage: TextUsage) -> ResponsesUsage:
    return ResponsesUsage(
        input_tokens=usage.num_prompt_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=usage.num_cached_tokens),
        output_tokens=usage.num_generated_tokens,
        output_tokens_details=OutputTokensDetails(),
        total_tokens=usage.num_prompt_tokens + usage.num_generated_tokens,
    )
