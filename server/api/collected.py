"""One choice's deltas put together, for answers in one piece."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from server.api.streaming import Delta, ScoredToken


@dataclass(slots=True)
class Collected:
    """Filled by `add`, in order."""

    texts: list[str] = field(default_factory=list)
    tokens: list[ScoredToken] = field(default_factory=list)
    finish_reason: str = "abort"  # until the last delta says otherwise
    stop_reason: int | str | None = None

    def add(self, delta: Delta) -> None:
        """Appends what the choice gained."""
        self.texts.append(delta.text)
        self.tokens.extend(delta.tokens)
        if delta.finish_reason is not None:
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason

    @property
    def mean_logprob(self) -> float:
        """Of its tokens, which must have been scored; nothing at all is the worst."""
        total = sum(token.logprob.logprob for token in self.tokens)
        return total / len(self.tokens) if self.tokens else -math.inf

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.texts)


def best(choices: Sequence[Collected], number: int) -> list[Collected]:
    """Those with the highest log-probability per token, as OpenAI's `best_of` has it, the best one first."""
    return sorted(choices, key=lambda choice: -choice.mean_logprob)[:number]
