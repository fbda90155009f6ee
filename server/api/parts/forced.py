"""Tool calls that a grammar enforces: `tool_choice` required, or a named function."""

from __future__ import annotations

from server.api.parts.base import CallArguments, CallStart, Part
from server.api.parts.call_reader import CallReader


class RequiredParser:
    """The answer is a JSON array of calls."""

    def __init__(self) -> None:
        self._num_calls = 0
        self._reader: CallReader | None = None

    def push(self, text: str) -> list[Part]:
        parts: list[Part] = []
        while text:
            if self._reader is None:
                text = text.lstrip(" \n[,]")
                if not text:
                    break
                self._reader = CallReader(self._num_calls)
            parts += self._reader.push(text)
            text = self._reader.rest
            if self._reader.is_done:
                self._reader = None
                self._num_calls += 1
        return parts

    def flush(self) -> list[Part]:
        return []


class NamedParser:
    """The answer is the arguments of one function."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._has_started = False

    def push(self, text: str) -> list[Part]:
        parts: list[Part] = [] if self._has_started else [CallStart(0, self._name)]
        self._has_started = True
        return [*parts, CallArguments(0, text)] if text else parts

    def flush(self) -> list[Part]:
        return []
