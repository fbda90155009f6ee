"""One choice being generated, and the request it belongs to. State only; the engine thread owns it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from server.engine.request import Request

Status = Literal["waiting", "running", "finished"]


@dataclass(slots=True, eq=False)
class RequestState:
    """What the choices of one request share."""

    request: Request
    arrival: float  # seconds, time.monotonic; set by submit
    started: float | None = None  # admitted; set by the engine
    first_token: float | None = None  # set by the engine
    num_cached_tokens: int = 0  # set when the context is opened
    num_reserved_bytes: int = 0  # set on admission, given back at the end
    num_unfinished: int = 0  # choices still to finish
    num_generated: int = 0  # over all choices
    num_visible: int = 0  # keys visible to decode attention, over heads, layers and steps
    num_scored: int = 0  # of these, scored exactly


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens of one choice: the prompt, then what was generated."""

    state: RequestState
    choice: int
    token_ids: list[int]
    status: Status = "waiting"
    num_computed: int = 0  # tokens whose K and V are in the context; set by the engine after each step
    context: Any = None  # retrieval.Context, set on admission; None before and after
    sampler_state: Any = None  # per-sequence generator and counts, owned by the sampler
    last_token_time: float | None = None  # seconds, time.monotonic
    last_chunk_step: int = 0  # scheduler's step number when it last got a prefill chunk
    refused_at: int = -1  # the manager's change count when memory was last refused
    stop_ids: frozenset[int] = field(default_factory=frozenset)

    @property
    def request(self) -> Request:
        """The request it answers."""
        return self.state.request

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_remaining(self) -> int:
        """Tokens that still have to go through the model before the next one can be sampled."""
        return len(self.token_ids) - self.num_computed

    @property
    def scores_prompt(self) -> bool:
        """Wants log-probabilities of the prompt, which it is still reading."""
        return self.request.sampling.num_prompt_logprobs is not None and self.num_generated == 0

    @property
    def is_prefilling(self) -> bool:
        """Has more than the newest generated token to compute."""
        return self.num_generated == 0 or self.num_remaining > 1
