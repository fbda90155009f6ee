"""The fields that chat and text completions share: sampling, stopping, streaming, sessions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from server.api.wire.base import Name, SessionName, Text, WireRequest, WireResponse
from server.api.wire.structure import Choices, ResponseFormat, Schema, StructuredOutputs

INT64 = 2**63
MAX_N = 128  # OpenAI's
MAX_STOPS = 64
MAX_LOGPROBS = 20  # OpenAI's

StopString = Annotated[Text, StringConstraints(min_length=1, max_length=1024)]
TokenId = Annotated[int, Field(ge=0)]
Bias = Annotated[float, Field(ge=-100, le=100)]


def _token_ids(bias: dict[str, float]) -> dict[str, float]:
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise ValueError(f"{key[:32]!a} is not a token id")
    return bias


class StreamOptions(WireRequest):
    """What a stream carries besides the text."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"include_obfuscation": (False,)}

    include_usage: bool = False
    continuous_usage_stats: bool = False

    @model_validator(mode="after")
    def _check_usage(self) -> StreamOptions:
        if self.continuous_usage_stats and not self.include_usage:
            raise ValueError("'continuous_usage_stats' needs 'include_usage': true")
        return self


class GenerationRequest(WireRequest):
    """Common part of both completion endpoints; null means the default, as in OpenAI's API."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "allowed_token_ids": (),
        "bad_words": ([],),
        "early_stopping": (False,),
        "guided_decoding_backend": (),
        "guided_whitespace_pattern": (),
        "kv_transfer_params": (),
        "length_penalty": (1, 1.0),
        "logits_processors": ([],),
        "return_token_ids": (False,),
        "return_tokens_as_token_ids": (False,),
        "spaces_between_special_tokens": (True,),
        "truncate_prompt_tokens": (),
        "use_beam_search": (False,),
        "vllm_xargs": ({},),
    }

    model: Name | None = None
    n: int | None = Field(None, ge=1, le=MAX_N)
    max_tokens: int | None = Field(None, ge=1, lt=INT64)
    min_tokens: int | None = Field(None, ge=0, lt=INT64)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=2)
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    logit_bias: Annotated[dict[str, Bias], AfterValidator(_token_ids)] | None = Field(None, max_length=1024)

    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: list[TokenId] | None = Field(None, max_length=1024)
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None

    stream: bool | None = None
    stream_options: StreamOptions | None = None

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | Text | None = None
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None

    user: Text | None = None
    priority: int | None = Field(None, ge=-INT64, lt=INT64)
    cache_salt: Name | None = None
    prompt_cache_key: SessionName | None = None

    @model_validator(mode="after")
    def _check_together(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' is only allowed with 'stream': true")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("'prompt_logprobs' is not available with 'stream': true")
        if self.min_tokens and self.max_new_tokens is not None and self.min_tokens > self.max_new_tokens:
            raise ValueError(f"'min_tokens' ({self.min_tokens}) exceeds 'max_tokens' ({self.max_new_tokens})")
        return self

    @property
    def max_new_tokens(self) -> int | None:
        """The limit of one choice, whatever the field is called; None: what fits."""
        return self.max_tokens

    @property
    def num_choices(self) -> int:
        """Choices to generate for each prompt."""
        return self.n or 1

    @property
    def has_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def has_usage_throughout(self) -> bool:
        """Whether every chunk tells the usage so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives reported per token; None: no log-probabilities at all."""
        return None

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same for the prompt's tokens."""
        return self.prompt_logprobs


class PromptTokensDetails(WireResponse):
    """Of the prompt's tokens, those that were not read again."""

    cached_tokens: int


class RetrievalDetails(WireResponse):
    """Our extension: keys scored exactly over keys visible, while decoding; null when nothing was decoded."""

    share_scanned: float | None


class PromptLogprob(WireResponse):
    """vLLM's: one token that stands in the prompt, or could have stood there; ranks count from 1."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobsByToken = list[dict[str, PromptLogprob] | None]  # per prompt token, by token id; null for the first one


class UsageInfo(WireResponse):
    """Tokens a request took, over all choices; while a stream runs, those of one choice so far, without details."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    retrieval_details: RetrievalDetails | None = None
