"""The content blocks of `/v1/messages` while they grow: text, thinking, tool_use; pure."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from server.api.parts.base import CallArguments, CallStart, Content, Part, Reasoning
from server.api.turn import CollectedTurn

NamedEvent = tuple[str, dict[str, Any]]


class Blocks:
    """At most one block is open; a part of another kind closes it."""

    def __init__(self) -> None:
        self._open: str | None = None  # its type
        self._index = 0
        self.num_calls = 0

    def take(self, parts: Sequence[Part], *, is_last: bool) -> Iterator[NamedEvent]:
        """Events that `parts` cause; the last ones close what is open."""
        for part in parts:
            match part:
                case Content(text):
                    yield from self._switch({"type": "text", "text": ""})
                    yield self._delta({"type": "text_delta", "text": text})
                case Reasoning(text):
                    yield from self._switch({"type": "thinking", "thinking": "", "signature": ""})
                    yield self._delta({"type": "thinking_delta", "thinking": text})
                case CallStart(_, name):
                    self.num_calls += 1
                    yield from self._close()
                    yield from self._switch({"type": "tool_use", "id": _tool_id(), "name": name, "input": {}})
                case CallArguments(_, text):
                    yield self._delta({"type": "input_json_delta", "partial_json": text})
        if is_last:
            if self._open is None and self._index == 0:
                yield from self._switch({"type": "text", "text": ""})
            yield from self._close()

    def _switch(self, block: dict[str, Any]) -> Iterator[NamedEvent]:
        if self._open != block["type"]:
            yield from self._close()
            self._open = block["type"]
            yield "content_block_start", {"index": self._index, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> NamedEvent:
        return "content_block_delta", {"index": self._index, "delta": delta}

    def _close(self) -> Iterator[NamedEvent]:
        if self._open is not None:
            yield "content_block_stop", {"index": self._index}
            self._open = None
            self._index += 1


def content_blocks(turn: CollectedTurn) -> list[dict[str, Any]]:
    """The blocks of an answer in one piece."""
    blocks: list[dict[str, Any]] = []
    if turn.reasoning:
        blocks.append({"type": "thinking", "thinking": turn.reasoning, "signature": ""})
    if turn.content.strip() or not turn.calls:
        blocks.append({"type": "text", "text": turn.content, "citations": None})
    for call in turn.calls:
        blocks.append({"type": "tool_use", "id": _tool_id(), "name": call.name, "input": _parsed(call.arguments)})
    return blocks


def _parsed(arguments: str) -> Any:
    """The arguments as an object; what a model cut off is passed on as it is."""
    try:
        return json.loads(arguments)
    except ValueError:
        return {"_incomplete": arguments}


def _tool_id() -> str:
    return f"toolu_{uuid.uuid4().hex[:24]}"
