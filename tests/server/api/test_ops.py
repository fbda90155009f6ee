"""/health, /version, /metrics and /v1/models."""

from __future__ import annotations

import httpx

from tests.server.conftest import MakeClient
from tests.server.fake_engine import FakeEngine


async def test_health_follows_the_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert (await client.get("/health")).status_code == 200
    engine.is_alive = False
    response = await client.get("/health")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_dead")


async def test_version_is_told(client: httpx.AsyncClient) -> None:
    assert (await client.get("/version")).json()["version"]


async def test_metrics_are_prometheus_text(client: httpx.AsyncClient) -> None:
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "retrieval_num_requests_running 0.0" in response.text


async def test_every_served_name_is_listed(make_client: MakeClient) -> None:
    client = make_client(served_model_name=["a/b", "c"])
    cards = (await client.get("/v1/models")).json()["data"]
    assert [card["id"] for card in cards] == ["a/b", "c"]
    assert {card["max_model_len"] for card in cards} == {4096}
    assert (await client.get("/v1/models/a/b")).json() == cards[0]


async def test_unknown_model_is_not_found(client: httpx.AsyncClient) -> None:
    response = await client.get("/v1/models/nothing")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
