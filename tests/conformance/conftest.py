"""A server on 127.0.0.1, over a scripted engine, and the SDKs' clients to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import uvicorn
from openai import OpenAI

from server.app import create_app
from server.config import Settings
from server.engine.tokenizer import Tokenizer
from server.metrics import Metrics
from tests.conftest import byte_level_tokenizer
from tests.server.fake_engine import FakeEngine, says

API_KEY = "conformance-key"


@dataclass(frozen=True, slots=True)
class Running:
    """A server that listens."""

    url: str
    engine: FakeEngine
    tokenizer: Tokenizer


@pytest.fixture(scope="session")
def _running() -> Iterator[Running]:
    tokenizer = byte_level_tokenizer()
    engine = FakeEngine(says(tokenizer, "unset"))
    app = create_app(Settings(api_key=[API_KEY]), engine, tokenizer, Metrics())
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield Running(f"http://127.0.0.1:{port}", engine, tokenizer)
    server.should_exit = True
    thread.join()


@pytest.fixture
def server(_running: Running) -> Running:
    """The server, answering `the quick brown fox`."""
    _running.engine.script = says(_running.tokenizer, "the quick brown fox", cached=2, has_logprobs=True)
    _running.engine.refusal = None
    _running.engine.requests.clear()
    _running.engine.streams.clear()
    return _running


@pytest.fixture
def client(server: Running) -> Iterator[OpenAI]:
    """OpenAI's own client, with only its URL and key changed."""
    with OpenAI(base_url=f"{server.url}/v1", api_key=API_KEY, max_retries=0) as client:
        yield client
