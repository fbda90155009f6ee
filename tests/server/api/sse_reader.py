"""Reads a stream the way a client does."""

from __future__ import annotations

import json
from typing import Any

import httpx


async def read(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> tuple[list[Any], list[str]]:
    """Events (parsed, `[DONE]` as a string) and comments of a streamed answer."""
    events: list[Any] = []
    comments: list[str] = []
    async with client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        async for line in response.aiter_lines():
            if line.startswith(":"):
                comments.append(line)
            elif line:
                data = line.removeprefix("data: ")
                events.append(data if data == "[DONE]" else json.loads(data))
    return events, comments


def text_of(events: list[Any], index: int = 0) -> str:
    """The text of one choice, put together."""
    text = ""
    for event in events[:-1]:
        for choice in event.get("choices", []):
            if choice["index"] == index:
                text += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
    return text
