"""One choice's deltas put together, for answers in one piece."""

from __future__ import annotations

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
    def text(self) -> str:
        """The whole text."""
        return "".join(self.texts)
