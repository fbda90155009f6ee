"""A document read once, asked about by several sessions, and found again after the server was killed."""

from __future__ import annotations

import json
import signal
import urllib.request
from typing import Any

from openai import OpenAI

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NEEDLE = "One of the special magic numbers for quiet-harbor is: 4071852. "
DOCUMENT = {"role": "system", "content": FILLER * 60 + NEEDLE + FILLER * 60}
QUESTION = {
    "role": "user",
    "content": "What is the special magic number for quiet-harbor mentioned in the provided text?",
}


def call(server: Any, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def ask(server: Any, session: str) -> tuple[str, int]:
    """The answer, and how many tokens of the prompt were cached."""
    with OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        answer = client.chat.completions.create(
            model="demo", messages=[DOCUMENT, QUESTION], prompt_cache_key=session, temperature=0, max_tokens=40
        )
    return answer.choices[0].message.content, answer.usage.prompt_tokens_details.cached_tokens


def test_sessions_outlive_a_killed_server(start_server, tmp_path):
    flags = ("--kv-disk-path", str(tmp_path / "kv"))
    server = start_server(*flags)
    document = call(server, "POST", "/v1/sessions", {"id": "doc", "messages": [DOCUMENT]})
    assert document["state"] in ("ready", "indexing")
    first, cached = ask(server, "doc")
    assert "4071852" in first
    assert cached == document["tokens"] > 2000
    call(server, "POST", "/v1/sessions/doc/fork", {"id": "a/fork"})
    assert ask(server, "a/fork")[0] == first
    held = call(server, "GET", "/v1/sessions")
    assert held["bytes"]["host_kv"] < 1.1 * document["bytes"]["host_kv"]
    assert call(server, "POST", "/v1/sessions/doc/pin", {"ttl_seconds": 60})["pinned"]
    saved = call(server, "POST", "/v1/sessions/doc/save")
    assert saved["saved_at"] is not None
    assert saved["bytes"]["disk"] >= saved["bytes"]["host_kv"]
    server.stop(signal.SIGKILL)

    server = start_server(*flags)
    (found,) = call(server, "GET", "/v1/sessions")["data"]
    assert (found["id"], found["state"], found["tokens"], found["pinned"]) == ("doc", "disk", saved["tokens"], False)
    restored = call(server, "POST", "/v1/sessions/doc/restore")
    assert restored["tokens_in_memory"] == saved["tokens"]
    again, cached = ask(server, "doc")
    assert again == first
    assert cached >= document["tokens"]
    call(server, "DELETE", "/v1/sessions/doc")
    assert call(server, "GET", "/v1/sessions")["data"] == []
