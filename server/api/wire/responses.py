"""`/v1/responses`: what of OpenAI's newer protocol maps onto a chat completion."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from server.api.wire.base import Name, SessionName, Text, WireRequest, WireResponse, check_json
from server.api.wire.generation import INT64
from server.api.wire.structure import JsonObjectFormat, Schema, TextFormat
from server.api.wire.tools import FunctionName


class InputText(WireRequest):
    """One part of a message; only text is supported."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"annotations": ([],), "logprobs": ([],)}

    type: Literal["input_text", "output_text", "text"]
    text: Text


class InputMessage(WireRequest):
    """A turn of the conversation; `id` and `status` come back from earlier answers and say nothing here."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"phase": ()}

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Text | list[InputText]
    id: Text | None = None
    status: Text | None = None


class FunctionCall(WireRequest):
    """A call the assistant made earlier."""

    type: Literal["function_call"]
    call_id: Text
    name: Text
    arguments: Text
    id: Text | None = None
    status: Text | None = None


class FunctionCallOutput(WireRequest):
    """What a call returned."""

    type: Literal["function_call_output"]
    call_id: Text
    output: Text | list[InputText]
    id: Text | None = None
    status: Text | None = None


class ReasoningText(WireRequest):
    """A part of earlier reasoning."""

    type: Literal["reasoning_text", "summary_text"]
    text: Text


class ReasoningItem(WireRequest):
    """What the assistant thought earlier; shown to the template as `reasoning_content`."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"encrypted_content": ()}

    type: Literal["reasoning"]
    id: Text | None = None
    status: Text | None = None
    summary: list[ReasoningText] = Field(default_factory=list)
    content: list[ReasoningText] | None = None


def _item_type(item: Any) -> str:
    """Messages may leave their type out."""
    return str(item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message"))


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_item_type),
]


class FunctionTool(WireRequest):
    """A function the model may call."""

    type: Literal["function"]
    name: FunctionName
    description: Text | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(check_json)] | None = None
    strict: bool | None = None


class FunctionChoice(WireRequest):
    """The model has to call this function."""

    type: Literal["function"]
    name: FunctionName


class SchemaFormat(WireRequest):
    """JSON that validates against a schema."""

    type: Literal["json_schema"]
    name: Name
    description: Text | None = None
    json_schema: Schema = Field(alias="schema")
    strict: bool | None = None


class TextConfig(WireRequest):
    """What the answer's text looks like."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"verbosity": ("medium",)}

    format: Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None


class ResponsesRequest(WireRequest):
    """Body of a response. Nothing is stored: `store` and whatever refers to stored responses are refused."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "background": (False,),
        "context_management": ([],),
        "conversation": (),
        "include": ([],),
        "max_tool_calls": (),
        "moderation": (),
        "previous_response_id": (),
        "prompt": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": ("in_memory",),
        "reasoning": ({},),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "stream_options": ({}, {"include_obfuscation": False}),
        "truncation": ("disabled",),
    }

    model: Name | None = None
    input: Text | Annotated[list[InputItem], Field(min_length=1)]
    instructions: Text | None = None
    max_output_tokens: int | None = Field(None, ge=1, lt=INT64)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_logprobs: Literal[0] | None = None
    text: TextConfig | None = None
    tools: list[FunctionTool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    metadata: dict[str, Text] | None = Field(None, max_length=16)
    user: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: SessionName | None = None


class InputTokensDetails(WireResponse):
    """Of the prompt's tokens, those that were not read again."""

    cached_tokens: int


class OutputTokensDetails(WireResponse):
    """Reasoning is not counted apart."""

    reasoning_tokens: int = 0


class ResponsesUsage(WireResponse):
    """Tokens it took."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponsesResponse(WireResponse):
    """A response; `output` holds messages, function calls and reasoning in their order."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"]
    model: str
    output: list[dict[str, Any]]
    error: None = None
    incomplete_details: dict[str, str] | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None = None
    store: Literal[False] = False
    temperature: float | None
    top_p: float | None
    tool_choice: Any
    tools: list[dict[str, Any]]
    text: dict[str, Any]
    truncation: Literal["disabled"] = "disabled"
    usage: ResponsesUsage | None = None
    user: str | None = None
