"""Calls of the API before anybody can make one."""

from __future__ import annotations

import json
from typing import Any

from server.app import create_app
from server.config import Settings
from server.engine.tokenizer import Tokenizer
from server.metrics import Metrics
from server.rehearsal import CHAT, GETS, EchoEngine, call, rehearse
from tests.server.fake_engine import FakeEngine


async def test_every_rehearsed_call_succeeds_and_none_reaches_the_engine(
    engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    metrics = Metrics()
    before = metrics.render()
    app: Any = create_app(Settings(api_key=["secret"]), EchoEngine(engine), tokenizer, metrics)
    bodies = [json.dumps({**CHAT, "stream": is_streamed}).encode() for is_streamed in (True, False)]
    assert [await call(app, "POST", "/v1/chat/completions", "secret", body) for body in bodies] == [200, 200]
    assert [await call(app, "GET", path, "secret") for path in GETS] == [200] * len(GETS)
    assert await call(app, "POST", "/v1/chat/completions", None, bodies[0]) == 401
    await rehearse(app, "secret")
    assert engine.requests == []
    assert _counts(metrics.render()) == _counts(before)


def _counts(text: bytes) -> list[str]:
    """All but when series were made and the process' own size."""
    lines = text.decode().splitlines()
    return [line for line in lines if "_created" not in line and "process_resident" not in line]
