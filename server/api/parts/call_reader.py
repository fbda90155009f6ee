"""Reads one tool call, `{"name": …, "arguments": {…}}`, while its JSON grows; pure."""

from __future__ import annotations

import json

from server.api.parts.base import CallArguments, CallStart, Part

ARGUMENT_KEYS = ("arguments", "parameters")  # Hermes and Qwen; Llama 3


class CallReader:
    """Gives the name as soon as it is complete, then the arguments as they come.

    `rest` is what follows the call in the pushed text. Nothing was given out while `has_started` is false; then `raw`
    may still be shown as plain text.
    """

    def __init__(self, call: int) -> None:
        self._call = call
        self._depth = 0
        self._is_in_string = self._is_escaped = self._is_in_arguments = False
        self._expects_key = True
        self._key = ""
        self._string: list[str] = []
        self._name: str | None = None
        self._arguments: list[str] = []  # read and not yet given out
        self._has_arguments = False
        self.raw = ""
        self.rest = ""
        self.has_started = self.is_done = self.is_broken = False

    def push(self, text: str) -> list[Part]:
        """Reads up to the end of the call, or until it turns out to be none."""
        num_read = 0
        for char in text:
            num_read += 1
            self._step(char)
            if self.is_done or self.is_broken:
                break
        self.raw += text[:num_read]
        self.rest = text[num_read:]
        return [] if self.is_broken else self._take()

    def _step(self, char: str) -> None:
        if self._is_in_arguments:
            self._arguments.append(char)
        if self._is_in_string:
            self._step_in_string(char)
        elif char == '"':
            self._is_in_string, self._string = True, [char]
        elif char in "{[":
            self._open(char)
        elif char in "}]":
            self._close()
        elif self._depth == 1 and char in ":,":
            self._expects_key = char == ","
        elif self._depth == 0 and not char.isspace():
            self.is_broken = True

    def _step_in_string(self, char: str) -> None:
        self._string.append(char)
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == '"':
            self._is_in_string = False
            if self._depth == 1:
                self._take_string()

    def _take_string(self) -> None:
        try:
            text = json.loads("".join(self._string), strict=False)
        except ValueError:
            self.is_broken = True
            return
        if self._expects_key:
            self._key = text
        elif self._key == "name":
            self._name = text
        elif self._key in ARGUMENT_KEYS:  # JSON within a string, as some models write it
            self._arguments, self._has_arguments = [text], True

    def _open(self, char: str) -> None:
        self.is_broken = self._depth == 0 and char == "["
        if self._depth == 1 and self._key in ARGUMENT_KEYS and char == "{":
            self._is_in_arguments = self._has_arguments = True
            self._arguments = [char]
        self._depth += 1

    def _close(self) -> None:
        self._depth -= 1
        if self._depth == 1:
            self._is_in_arguments = False
        if self._depth <= 0:
            self.is_done, self.is_broken = self._name is not None, self._name is None

    def _take(self) -> list[Part]:
        if self._name is None:
            return []
        parts: list[Part] = [] if self.has_started else [CallStart(self._call, self._name)]
        self.has_started = True
        if self.is_done and not self._has_arguments:
            self._arguments = ["{}"]
        if self._arguments:
            parts.append(CallArguments(self._call, "".join(self._arguments)))
            self._arguments = []
        return parts
