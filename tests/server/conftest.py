"""A running app over a fake engine, and a client to it in the same event loop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from server.app import create_app
from server.config import Settings
from server.engine.tokenizer import Tokenizer
from server.metrics import Metrics
from tests.server.fake_engine import FakeEngine, says

MakeClient = Callable[..., httpx.AsyncClient]


@pytest.fixture
def engine(tokenizer: Tokenizer) -> FakeEngine:
    """Says `the quick brown fox` to everything."""
    return FakeEngine(says(tokenizer, "the quick brown fox"))


@pytest.fixture
async def make_client(engine: FakeEngine, tokenizer: Tokenizer) -> AsyncIterator[MakeClient]:
    """`make_client(**settings)`: a client of an app with these settings over `engine`."""
    clients: list[httpx.AsyncClient] = []

    def make(tokenizer: Tokenizer = tokenizer, **settings: Any) -> httpx.AsyncClient:
        app = create_app(Settings(**settings), engine, tokenizer, Metrics())
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        clients.append(httpx.AsyncClient(transport=transport, base_url="http://server"))
        return clients[-1]

    yield make
    for client in clients:
        await client.aclose()


@pytest.fixture
def client(make_client: MakeClient) -> httpx.AsyncClient:
    """A client of an app with default settings."""
    return make_client()
