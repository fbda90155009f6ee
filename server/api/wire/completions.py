"""`/v1/completions`: request, response and stream chunk (both have the same shape)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import Field, model_validator

from server.api.wire.base import Text, WireResponse
from server.api.wire.generation import (
    INT64,
    MAX_LOGPROBS,
    MAX_N,
    GenerationRequest,
    PromptLogprobsByToken,
    TokenId,
    UsageInfo,
)

MAX_PROMPTS = 256
DEFAULT_MAX_TOKENS = 16  # OpenAI's and vLLM's, for this endpoint only

TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Prompt = (
    Text
    | TokenIds
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
)


class CompletionRequest(GenerationRequest):
    """Body of a text completion; a prompt is text or token ids, or a list of either."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = GenerationRequest.unsupported | {
        "prompt_embeds": (),
        "suffix": ("",),
    }

    prompt: Prompt
    max_tokens: int | None = Field(None, ge=0, lt=INT64)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = Field(None, ge=1, le=MAX_N)

    @model_validator(mode="after")
    def _check_completion(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValueError(f"'best_of' ({self.best_of}) is less than 'n' ({self.n})")
        if self.is_selective and self.stream:
            raise ValueError("'best_of' greater than 'n' is not available with 'stream': true")
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise ValueError("'max_tokens' 0 needs 'echo' or 'prompt_logprobs'")
        return self

    @property
    def is_selective(self) -> bool:
        """Whether more choices are generated than shown."""
        return self.num_choices > (self.n or 1)

    @property
    def num_choices(self) -> int:
        return self.best_of or self.n or 1

    @property
    def max_new_tokens(self) -> int | None:
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return 0 if self.logprobs is None and self.is_selective else self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        is_asked_for = self.prompt_logprobs is not None or not self.echo
        return self.prompt_logprobs if is_asked_for else self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """Always a list of prompts."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        is_one = isinstance(self.prompt[0], int)
        return cast("list[str | list[int]]", [self.prompt] if is_one else self.prompt)


class CompletionLogprobs(WireResponse):
    """Log-probabilities in the old shape: parallel lists over the tokens."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(WireResponse):
    """One text, or what a chunk adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: PromptLogprobsByToken | None = None


class CompletionResponse(WireResponse):
    """A finished text completion, or one event of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageInfo | None = None
