"""Stop strings over a growing text, whatever the token borders; pure."""

from __future__ import annotations

from collections.abc import Sequence


class StopFinder:
    """Gives text on until a stop string appears; what may still become one is held back.

    A text costs O(its length × number of stops), whatever came before it. `include_stop` shows the stop string too.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._held = ""
        self.found: str | None = None
        self.rest = ""  # of the pushed text, what follows the stop string

    def push(self, text: str, *, is_armed: bool = True) -> str:
        """Text to show now. Sets `found` when a stop string is complete; nothing may be pushed after that.

        While not `is_armed` (before min_tokens), text passes and cannot become part of a stop string later.
        """
        assert self.found is None
        text = self._held + text
        if not is_armed or not self._stops:
            self._held = ""
            return text
        hit = min(
            ((at, -len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0),
            default=None,
        )
        if hit is not None:
            at, _, self.found = hit
            self._held, self.rest = "", text[at + len(self.found) :]
            return text[: at + len(self.found)] if self._include_stop else text[:at]
        keep = self._num_held(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What is still held back, when the text has ended."""
        text, self._held = self._held, ""
        return text

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max(map(len, self._stops)) - 1
        for size in range(min(longest, len(text)), 0, -1):
            end = text[len(text) - size :]
            if any(stop.startswith(end) for stop in self._stops):
                return size
        return 0
