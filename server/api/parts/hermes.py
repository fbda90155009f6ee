"""Tool calls as Hermes and Qwen 2.5/3 write them: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`."""

from __future__ import annotations

from server.api.parts.base import Content, Part
from server.api.parts.call_reader import CallReader
from server.api.stops import StopFinder

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesParser:
    """Text outside of the tags is content; white space between calls is dropped."""

    def __init__(self) -> None:
        self._finder = StopFinder([OPEN, CLOSE])
        self._reader: CallReader | None = None
        self._num_calls = 0

    def push(self, text: str) -> list[Part]:
        parts: list[Part] = []
        while text:
            found, text = self._read_call(text) if self._reader else self._read_text(text)
            parts += found
        return parts

    def flush(self) -> list[Part]:
        if self._reader is not None:
            held = "" if self._reader.has_started else OPEN + self._reader.raw
        else:
            held = self._finder.flush()
        return self._content(held)

    def _read_text(self, text: str) -> tuple[list[Part], str]:
        shown = self._finder.push(text)
        if self._finder.found is None:
            return self._content(shown), ""
        is_open, rest = self._finder.found == OPEN, self._finder.rest
        self._finder = StopFinder([OPEN, CLOSE])
        self._reader = CallReader(self._num_calls) if is_open else None
        return self._content(shown), rest

    def _read_call(self, text: str) -> tuple[list[Part], str]:
        reader = self._reader
        assert reader is not None
        parts = reader.push(text)
        if reader.is_broken:  # no call after all
            self._reader = None
            return self._content("" if reader.has_started else OPEN + reader.raw), reader.rest
        if reader.is_done:
            self._reader = None
            self._num_calls += 1
        return parts, reader.rest

    def _content(self, text: str) -> list[Part]:
        is_gap = self._num_calls > 0 and not text.strip()
        return [Content(text)] if text and not is_gap else []
