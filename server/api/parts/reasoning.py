"""Reasoning as DeepSeek-R1 and Qwen 3 write it: `<think>…</think>` before the answer."""

from __future__ import annotations

from server.api.parts.base import Part, PartParser, Reasoning
from server.api.stops import StopFinder

OPEN, CLOSE = "<think>", "</think>"


class ReasoningParser:
    """What stands between the tags is reasoning; what follows them goes to `inner`.

    `is_open`: the prompt itself ended with the opening tag, as some templates have it.
    """

    def __init__(self, inner: PartParser, *, is_open: bool) -> None:
        self._inner = inner
        self._start = None if is_open else ""  # text while it may still become the opening tag
        self._finder: StopFinder | None = StopFinder([CLOSE]) if is_open else None
        self._is_at_start = True

    def push(self, text: str) -> list[Part]:
        if self._start is not None:
            return self._decide(text)
        if self._finder is None:
            return self._push_content(text)
        shown = self._finder.push(text)
        parts = self._reasoning(shown)
        if self._finder.found is not None:
            rest, self._finder, self._is_at_start = self._finder.rest, None, True
            parts += self._push_content(rest)
        return parts

    def flush(self) -> list[Part]:
        held = self._reasoning(self._finder.flush()) if self._finder is not None else []
        start, self._start = self._start, None
        return [*held, *(self._inner.push(start) if start else []), *self._inner.flush()]

    def _decide(self, text: str) -> list[Part]:
        """Whether the answer begins with the opening tag."""
        self._start = (self._start or "") + text
        begun = self._start.lstrip()
        if OPEN.startswith(begun) and begun != OPEN:  # not yet to be told
            return []
        start, self._start = self._start, None
        if not begun.startswith(OPEN):
            self._is_at_start = False
            return self._inner.push(start)
        self._finder = StopFinder([CLOSE])
        return self.push(begun.removeprefix(OPEN))

    def _reasoning(self, text: str) -> list[Part]:
        text = self._without_leading_space(text)
        return [Reasoning(text)] if text else []

    def _push_content(self, text: str) -> list[Part]:
        text = self._without_leading_space(text)
        return self._inner.push(text) if text else []

    def _without_leading_space(self, text: str) -> str:
        """Templates put line breaks after either tag."""
        if self._is_at_start:
            text = text.lstrip("\n")
            self._is_at_start = not text
        return text
