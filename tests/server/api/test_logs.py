"""Logs and errors tell nothing of what users wrote, nor clients anything of the server's insides."""

from __future__ import annotations

import logging
from typing import Any

import httpx
import pytest

from server.engine.events import Event, Failure
from server.engine.request import Request
from server.engine.tokenizer import Tokenizer
from server.errors import MemoryExhaustedError
from tests.server.conftest import MakeClient
from tests.server.fake_engine import FakeEngine, says

SECRET = "xyzzy-plugh"
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": SECRET}]}
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", CHAT | {"stream": True}),
    ("/v1/chat/completions", CHAT | {"temperature": 9}),
    ("/v1/chat/completions", CHAT | {"stop": SECRET, "user": SECRET}),
    ("/v1/chat/completions", {"messages": [{"role": SECRET, "content": SECRET}]}),
    ("/v1/chat/completions", CHAT | {"response_format": {"type": SECRET}}),
    ("/v1/chat/completions", CHAT | {"guided_regex": f"({SECRET}"}),
    ("/v1/chat/completions", CHAT | {"chat_template_kwargs": {SECRET: SECRET}}),
    ("/v1/chat/completions", CHAT | {SECRET: 1}),
    ("/v1/completions", {"prompt": SECRET, "echo": True, "logprobs": 1}),
    ("/v1/completions", {"prompt": [SECRET, 5]}),
    ("/v1/responses", {"input": SECRET, "stream": True}),
    ("/v1/messages", {"max_tokens": 5} | CHAT),
    ("/tokenize", {"prompt": SECRET}),
]


async def send_all(client: httpx.AsyncClient) -> list[int]:
    return [(await client.post(path, json=body)).status_code for path, body in CALLS]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Everything of ours; the client of the tests logs for itself."""
    caplog.set_level(logging.DEBUG)
    for name in ("httpx", "httpcore", "httpx2", "httpcore2"):
        caplog.set_level(logging.WARNING, logger=name)
    return caplog


async def test_no_prompt_is_logged_whatever_becomes_of_it(
    make_client: MakeClient, engine: FakeEngine, tokenizer: Tokenizer, log: pytest.LogCaptureFixture
) -> None:
    def fails(request: Request) -> list[Event]:
        return [Failure(MemoryExhaustedError("too much"))]

    def breaks(request: Request) -> list[Event]:
        raise RuntimeError("a defect")

    statuses: set[int] = set()
    for script in (says(tokenizer, "fox"), fails, breaks):
        engine.script = script
        statuses |= set(await send_all(make_client()))
    assert statuses == {200, 400, 500, 503}
    assert "RuntimeError" in log.text  # it does hold what it should
    assert SECRET not in log.text


async def test_prompt_within_a_defects_message_is_not_logged(
    make_client: MakeClient, engine: FakeEngine, log: pytest.LogCaptureFixture
) -> None:
    """Errors of libraries tend to quote what they choked on."""

    def breaks(request: Request) -> list[Event]:
        raise ValueError(f"cannot read {SECRET}")

    engine.script = breaks
    assert (await make_client().post("/v1/chat/completions", json=CHAT)).status_code == 500
    assert "ValueError" in log.text
    assert "test_logs.py" in log.text  # where it happened
    assert SECRET not in log.text


async def test_clients_are_told_no_stack(make_client: MakeClient, engine: FakeEngine) -> None:
    def breaks(request: Request) -> list[Event]:
        raise RuntimeError("at line 7 of engine.py")

    engine.script = breaks
    for path, body in CALLS:
        text = (await make_client().post(path, json=body)).text
        for word in ("Traceback", ".py", "line 7", "RuntimeError", "site-packages"):
            assert word not in text, (path, body)
