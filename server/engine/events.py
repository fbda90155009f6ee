"""What the engine tells about a request, in order: Progress* and PromptLogprobs* as the prompt is read, then Token* and
Finish per choice, then Done or Failure.

Made on the engine thread, consumed on the event loop; values only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from server.errors import ServerError

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the prompt has been read (also sent while it waits in the queue, with the same figures)."""

    num_prefilled_tokens: int  # cached ones included
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of a token under the model's distribution before sampling filters."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True, eq=False)
class PromptLogprobs:
    """Scores of the prompt's tokens from position `start` on, when asked for; there is none of the first token.

    Arrays, since there may be as many as the context is long. Per token the first column is the token itself, the
    others the `num_prompt_logprobs` most likely ones, descending; ranks count from 1.
    """

    start: int
    token_ids: NDArray[np.int32]  # [num_tokens, 1 + num_prompt_logprobs]
    logprobs: NDArray[np.float32]  # the same shape; natural log, before sampling filters
    ranks: NDArray[np.int32]  # [num_tokens], of the token itself


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token of one choice. An eos or stop token is sent too; its text is not shown."""

    choice: int
    token_id: int
    logprob: TokenLogprob | None = None  # when asked for
    top_logprobs: tuple[TokenLogprob, ...] = ()  # descending, `num_logprobs` of them


@dataclass(frozen=True, slots=True)
class Finish:
    """One choice has ended: `stop` by eos or a stop token, `length` by max_tokens or the context."""

    choice: int
    reason: FinishReason
    stop_token_id: int | None = None  # the eos or stop token that ended it


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request took."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int  # over all choices
    share_scanned: float | None  # exact scores computed / keys visible, over decode steps; None: none ran


@dataclass(frozen=True, slots=True)
class Done:
    """All choices have finished; the last event."""

    usage: Usage


@dataclass(frozen=True, slots=True)
class Failure:
    """The request ended in an error; the last event."""

    error: ServerError


Event = Progress | PromptLogprobs | Token | Finish | Done | Failure
