"""`/tokenize` and `/detokenize`, in vLLM's shapes."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, model_validator

from server.api.wire.base import Name, Text, WireRequest, WireResponse
from server.api.wire.chat import ChatMessage, TemplateKwargs
from server.api.wire.generation import TokenId
from server.api.wire.tools import Tools


class TokenizeRequest(WireRequest):
    """Text or messages to encode: exactly one of `prompt` and `messages`."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "chat_template": (),
        "mm_processor_kwargs": ({},),
    }

    model: Name | None = None
    prompt: Text | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    tools: Tools | None = None
    add_special_tokens: bool | None = None  # vLLM's defaults: true for a prompt, false for messages
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    return_token_strs: bool | None = None
    chat_template_kwargs: TemplateKwargs | None = None

    @model_validator(mode="after")
    def _check_one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("exactly one of 'prompt' and 'messages' is needed")
        if self.messages is not None and self.continue_final_message and self.add_generation_prompt:
            raise ValueError("'continue_final_message' needs 'add_generation_prompt': false")
        return self


class TokenizeResponse(WireResponse):
    """Token ids, how many they are and how many the model takes."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(WireRequest):
    """Token ids to turn into text."""

    model: Name | None = None
    tokens: list[TokenId]


class DetokenizeResponse(WireResponse):
    """The text, special tokens included."""

    prompt: str
