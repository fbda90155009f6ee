"""The output items of `/v1/responses` while they grow: messages, function calls, reasoning; pure."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from server.api.parts.base import CallArguments, CallStart, Content, Part, Reasoning
from server.api.turn import new_call_id

NamedEvent = tuple[str, dict[str, Any]]


class Items:
    """At most one item is open; a part of another kind closes it."""

    def __init__(self) -> None:
        self.done: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._text = ""  # of the open item: text or arguments

    def take(self, parts: Sequence[Part], *, is_last: bool) -> Iterator[NamedEvent]:
        """Events that `parts` cause; the last ones close what is open."""
        for part in parts:
            match part:
                case Content(text):
                    yield from self._switch("message")
                    yield from self._grow("response.output_text.delta", text, {"content_index": 0, "logprobs": []})
                case Reasoning(text):
                    yield from self._switch("reasoning")
                    yield from self._grow("response.reasoning_text.delta", text, {"content_index": 0})
                case CallStart(_, name):
                    yield from self._close()
                    yield from self._begin(_new_call(name))
                case CallArguments(_, text):
                    yield from self._grow("response.function_call_arguments.delta", text, {})
        if is_last:
            if self._open is None and not self.done:
                yield from self._switch("message")  # an empty answer is an empty message
            yield from self._close()

    def _switch(self, kind: str) -> Iterator[NamedEvent]:
        if self._open is None or self._open["type"] != kind:
            yield from self._close()
            yield from self._begin(_new_message() if kind == "message" else _new_reasoning())

    def _begin(self, item: dict[str, Any]) -> Iterator[NamedEvent]:
        self._open, self._text = item, ""
        yield "response.output_item.added", {"output_index": len(self.done), "item": item}
        if item["type"] == "message":
            yield "response.content_part.added", {**self._where(), "content_index": 0, "part": _output_text("")}

    def _grow(self, name: str, text: str, fields: dict[str, Any]) -> Iterator[NamedEvent]:
        self._text += text
        yield name, {**self._where(), **fields, "delta": text}

    def _close(self) -> Iterator[NamedEvent]:
        if self._open is None:
            return
        where, text = self._where(), self._text
        item = self._open | {"status": "completed"}
        match item["type"]:
            case "message":
                item["content"] = [_output_text(text)]
                place = {**where, "content_index": 0}
                yield "response.output_text.done", {**place, "text": text, "logprobs": []}
                yield "response.content_part.done", {**place, "part": _output_text(text)}
            case "reasoning":
                item["content"] = [{"type": "reasoning_text", "text": text}]
                yield "response.reasoning_text.done", {**where, "content_index": 0, "text": text}
            case "function_call":
                item["arguments"] = text
                yield "response.function_call_arguments.done", {**where, "name": item["name"], "arguments": text}
        self.done.append(item)
        self._open = None
        yield "response.output_item.done", {"output_index": where["output_index"], "item": item}

    def _where(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self.done)}


def _output_text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _new_message() -> dict[str, Any]:
    return {"type": "message", "id": _id("msg"), "role": "assistant", "status": "in_progress", "content": []}


def _new_reasoning() -> dict[str, Any]:
    return {"type": "reasoning", "id": _id("rs"), "status": "in_progress", "summary": [], "content": []}


def _new_call(name: str) -> dict[str, Any]:
    item = {"type": "function_call", "id": _id("fc"), "status": "in_progress"}
    return item | {"call_id": new_call_id(), "name": name, "arguments": ""}


def _id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
