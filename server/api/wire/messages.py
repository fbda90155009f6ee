"""`/v1/messages`: Anthropic's protocol, as far as it maps onto a chat completion."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from server.api.wire.base import Name, Text, WireRequest, WireResponse, check_json
from server.api.wire.generation import INT64, MAX_STOPS, StopString
from server.api.wire.tools import FunctionName

JsonObject = Annotated[dict[str, Any], AfterValidator(check_json)]


class CacheControl(WireRequest):
    """Asks for what happens anyway: prompts that start alike are read once."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Block(WireRequest):
    """A part of a message."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"citations": ()}

    cache_control: CacheControl | None = None


class TextBlock(Block):
    """Plain text."""

    type: Literal["text"]
    text: Text


class ToolUseBlock(Block):
    """A call the assistant made earlier."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"caller": ({"type": "direct"},)}

    type: Literal["tool_use"]
    id: Text
    name: Text
    input: JsonObject


class ToolResultBlock(Block):
    """What a call returned."""

    type: Literal["tool_result"]
    tool_use_id: Text
    content: Text | list[TextBlock] | None = None
    is_error: bool | None = None


class ThinkingBlock(WireRequest):
    """What the assistant thought earlier; the signature says nothing here."""

    type: Literal["thinking"]
    thinking: Text
    signature: Text | None = None


AnyBlock = Annotated[TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock, Field(discriminator="type")]


class InputTurn(WireRequest):
    """A turn of the conversation."""

    role: Literal["user", "assistant"]
    content: Text | list[AnyBlock]


class InputTool(WireRequest):
    """A function the model may call; `input_schema` is a JSON schema."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "allowed_callers": (["direct"],),
        "defer_loading": (False,),
        "eager_input_streaming": (False, True),
        "input_examples": ([],),
    }

    type: Literal["custom"] | None = None
    name: FunctionName
    description: Text | None = None
    input_schema: JsonObject
    strict: bool | None = None
    cache_control: CacheControl | None = None


class InputToolChoice(WireRequest):
    """`any` means that some tool has to be called, `tool` that this one has to be."""

    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = None
    disable_parallel_tool_use: bool | None = None


class Metadata(WireRequest):
    """Who asks; not used."""

    user_id: Text | None = None


class PromptRequest(WireRequest):
    """What a prompt is made of."""

    model: Name | None = None
    messages: list[InputTurn] = Field(min_length=1)
    system: Text | list[TextBlock] | None = None
    tools: list[InputTool] | None = Field(None, max_length=128)
    tool_choice: InputToolChoice | None = None


class CountTokensRequest(PromptRequest):
    """Body of `/v1/messages/count_tokens`."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"thinking": ({"type": "disabled"},)}


class CountTokensResponse(WireResponse):
    """Tokens of the prompt."""

    input_tokens: int


class MessagesRequest(PromptRequest):
    """Body of a message."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "cache_control": (),
        "container": (),
        "context_management": (),
        "inference_geo": (),
        "mcp_servers": ([],),
        "output_config": ({},),
        "output_format": (),
        "service_tier": ("auto", "standard_only"),
        "thinking": ({"type": "disabled"},),
    }

    max_tokens: int = Field(ge=1, lt=INT64)
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31)
    stop_sequences: list[StopString] | None = Field(None, max_length=MAX_STOPS)
    stream: bool | None = None
    metadata: Metadata | None = None


class MessagesUsage(WireResponse):
    """Tokens it took; `input_tokens` are those that were not cached."""

    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0


class MessagesResponse(WireResponse):
    """An answer; `content` holds text, thinking and tool_use blocks in their order."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessagesUsage
