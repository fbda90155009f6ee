"""`/v1/chat/completions`: request, response and stream chunk."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from server.api.wire.base import Text, WireRequest, WireResponse, check_json
from server.api.wire.generation import INT64, MAX_LOGPROBS, GenerationRequest, PromptLogprobsByToken, UsageInfo
from server.api.wire.tools import AnswerToolCall, ToolCall, ToolCallDelta, ToolChoice, Tools

# Set by the server itself when it renders a template.
_SERVER_SET = (
    "add_generation_prompt chat_template continue_final_message conversation documents max_length messages padding "
    "return_assistant_tokens_mask return_dict return_tensors tokenize tokenizer_kwargs tools truncation"
)
RESERVED_TEMPLATE_KWARGS = frozenset(_SERVER_SET.split(" "))


def _template_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    reserved = sorted(RESERVED_TEMPLATE_KWARGS & kwargs.keys())
    if reserved:
        raise ValueError(f"'{reserved[0]}' is set by the server")
    check_json(kwargs)
    return kwargs


JsonObject = Annotated[dict[str, Any], AfterValidator(check_json)]
TemplateKwargs = Annotated[dict[str, Any], AfterValidator(_template_kwargs)]


class TextPart(WireRequest):
    """One part of a message; only text is supported."""

    type: Literal["text"]
    text: Text


class ChatMessage(WireRequest):
    """One turn of the conversation."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "annotations": ([],),
        "audio": (),
        "function_call": (),
        "reasoning": (),
        "refusal": (),
    }

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None = None
    name: Text | None = None
    tool_call_id: Text | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning_content: Text | None = None
    provider_specific_fields: JsonObject | None = None  # LiteLLM sends back what it noted of an answer; not used

    @model_validator(mode="after")
    def _check_content(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a {self.role} message needs 'content'")
        return self

    @property
    def text(self) -> str:
        """The content as one string; parts are joined by line breaks, as vLLM does."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


class ChatRequest(GenerationRequest):
    """Body of a chat completion."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = GenerationRequest.unsupported | {
        "audio": (),
        "best_of": (1,),
        "chat_template": (),
        "documents": ([],),
        "function_call": ("none",),
        "functions": ([],),
        "include_reasoning": (True,),
        "metadata": ({},),
        "mm_processor_kwargs": ({},),
        "modalities": (["text"],),
        "prediction": (),
        "prompt_cache_retention": ("in_memory",),
        "reasoning_effort": ("none",),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "thinking_token_budget": (),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, lt=INT64)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    echo: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: TemplateKwargs | None = None
    safety_identifier: Text | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("'top_logprobs' needs 'logprobs': true")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("'continue_final_message' needs 'add_generation_prompt': false")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("'max_tokens' and 'max_completion_tokens' differ; give one of them")
        return self

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TopLogprob(WireResponse):
    """A token that could have been chosen."""

    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TopLogprob):
    """A chosen token and its alternatives, most likely first."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(WireResponse):
    """Log-probabilities of the answer's tokens."""

    content: list[ContentLogprob]
    refusal: None = None


class AnswerMessage(WireResponse):
    """The whole answer of one choice."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[AnswerToolCall] | None = None


class ChatChoice(WireResponse):
    """One answer; `stop_reason` is vLLM's: the stop string or token that ended it."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: int | str | None = None


class ChatResponse(WireResponse):
    """A finished chat completion."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageInfo
    prompt_logprobs: PromptLogprobsByToken | None = None


class Delta(WireResponse):
    """What a chunk adds to a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(WireResponse):
    """What a chunk adds to one choice."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class ChatChunk(WireResponse):
    """One event of a stream; `usage` is there only when asked for."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: UsageInfo | None = None
