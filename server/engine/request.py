"""What is asked of the engine: token ids and sampling parameters, validated before they get here.

Immutable; made on the event loop, read by the engine thread. Knows nothing of HTTP or text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from server.engine.constraint import LogitsConstraint
from server.engine.session_info import SessionKey


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen. Names and meanings follow vLLM and OpenAI."""

    n: int = 1  # sequences (choices) generated from one prompt
    max_tokens: int | None = None  # None: as many as fit --max-model-len; 0: only read the prompt
    min_tokens: int = 0  # eos and stop tokens are not sampled before this many
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 or less: off
    min_p: float = 0.0
    presence_penalty: float = 0.0  # over generated tokens
    frequency_penalty: float = 0.0  # over generated tokens
    repetition_penalty: float = 1.0  # over prompt and generated tokens
    seed: int | None = None  # None: drawn once per request
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, bias in [-100, 100])
    num_logprobs: int | None = None  # None: no logprobs; 0: the chosen token's only
    num_prompt_logprobs: int | None = None  # the same for the prompt, which is then read whole, cached or not
    stop_token_ids: tuple[int, ...] = ()  # besides the model's eos ids
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """One accepted call. Every submitted request ends in exactly one of finish, error, abort."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    session_id: str | None = None  # prompt_cache_key or X-Session-Id
    session_owner: str = ""  # whose sessions it may name: a digest of the API key
    cache_salt: str = ""  # tenants with different salts share no segments
    priority: int = 0  # lower runs earlier, as in vLLM
    max_new_tokens: int = 0  # resolved from sampling.max_tokens by Engine.submit
    make_constraint: Callable[[], LogitsConstraint] | None = None  # called once per choice, on the engine thread

    @property
    def session(self) -> SessionKey | None:
        """The session it belongs to, if it names one."""
        return None if self.session_id is None else SessionKey(self.session_owner, self.cache_salt, self.session_id)
