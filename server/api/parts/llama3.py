"""Tool calls as Llama 3 writes them: an answer that is `{"name": …, "parameters": {…}}`, several separated by `;`."""

from __future__ import annotations

from server.api.parts.base import Content, Part
from server.api.parts.call_reader import CallReader

PYTHON_TAG = "<|python_tag|>"


class Llama3Parser:
    """An answer either begins with a call or is content throughout."""

    def __init__(self) -> None:
        self._held = ""  # white space and the tag before a call
        self._reader: CallReader | None = None
        self._num_calls = 0
        self._is_content = False

    def push(self, text: str) -> list[Part]:
        parts: list[Part] = []
        while text:
            if self._is_content:
                return [*parts, Content(text)]
            found, text = self._read_call(text) if self._reader else self._read_gap(text)
            parts += found
        return parts

    def flush(self) -> list[Part]:
        held = self._held
        if self._reader is not None and not self._reader.has_started:
            held += self._reader.raw
        self._held, self._reader = "", None
        return [Content(held)] if held.strip() and not self._num_calls else []

    def _read_gap(self, text: str) -> tuple[list[Part], str]:
        """Looks for the next `{`; anything but white space, `;` and the tag before it means content."""
        self._held += text
        start = self._held.strip(" \n\t;,")
        if start.startswith(PYTHON_TAG):
            start = start.removeprefix(PYTHON_TAG).lstrip()
        if not start or PYTHON_TAG.startswith(start):
            return [], ""
        if not start.startswith("{"):
            self._is_content = True
            return [], self._take_held()
        at = self._held.index("{")
        self._held, rest = self._held[:at], self._held[at:]
        self._reader = CallReader(self._num_calls)
        return [], rest

    def _read_call(self, text: str) -> tuple[list[Part], str]:
        reader = self._reader
        assert reader is not None
        parts = reader.push(text)
        if reader.is_broken:
            self._reader, self._is_content = None, True
            return [], ("" if reader.has_started else self._take_held() + reader.raw) + reader.rest
        if reader.is_done:
            self._reader, self._held = None, ""
            self._num_calls += 1
        return parts, reader.rest

    def _take_held(self) -> str:
        held, self._held = self._held, ""
        return held
