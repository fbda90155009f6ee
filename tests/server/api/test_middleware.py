"""Request ids, API keys, body limit and CORS."""

from __future__ import annotations

import asyncio
import hmac

import httpx
import pytest

from server.engine.events import Done, Finish, Usage
from tests.server.conftest import MakeClient
from tests.server.fake_engine import FakeEngine

COMPLETIONS = "/v1/completions"


async def test_request_id_is_echoed(client: httpx.AsyncClient) -> None:
    response = await client.get("/health", headers={"X-Request-Id": "abc-1"})
    assert response.headers["x-request-id"] == "abc-1"


@pytest.mark.parametrize("given", [None, "", "a b", "x" * 200])
async def test_request_id_is_made_where_there_is_no_usable_one(client: httpx.AsyncClient, given: str | None) -> None:
    first, second = [
        await client.get("/health", headers={} if given is None else {"X-Request-Id": given}) for _ in range(2)
    ]
    assert first.headers["x-request-id"] not in ("", given)
    assert first.headers["x-request-id"] != second.headers["x-request-id"]


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer ", "Basic one", "one", "Bearer onetwo"])
async def test_call_without_a_known_key_is_refused(make_client: MakeClient, header: str | None) -> None:
    client = make_client(api_key=["one", "two"])
    for path in ("/v1/models", "/metrics", "/version", "/openapi.json"):
        response = await client.get(path, headers={} if header is None else {"Authorization": header})
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("key", ["one", "two"])
async def test_any_of_the_keys_is_accepted(make_client: MakeClient, key: str) -> None:
    client = make_client(api_key=["one", "two"])
    assert (await client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})).status_code == 200


async def test_key_may_come_anthropics_way(make_client: MakeClient) -> None:
    client = make_client(api_key=["one"])
    assert (await client.get("/v1/models", headers={"X-Api-Key": "one"})).status_code == 200
    assert (await client.get("/v1/models", headers={"X-Api-Key": "two"})).status_code == 401


async def test_metrics_may_be_open(make_client: MakeClient) -> None:
    assert (await make_client(api_key=["one"], open_metrics=True).get("/metrics")).status_code == 200


async def test_key_has_only_so_many_generations_at_once(make_client: MakeClient, engine: FakeEngine) -> None:
    engine.script = lambda request: []
    client = make_client(api_key=["one", "two"], max_concurrency_per_key=1)
    first, second = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
    running = asyncio.create_task(client.post(COMPLETIONS, json={"prompt": "x"}, headers=first))
    await engine.submitted.wait()
    refused = await client.post(COMPLETIONS, json={"prompt": "x"}, headers=first)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert refused.headers["retry-after"] == "1"
    assert (await client.get("/v1/models", headers=first)).status_code == 200
    engine.streams[0].push(Finish(0, "length"), Done(Usage(1, 0, 0, None)))
    assert (await running).status_code == 200
    for headers in (first, second):
        answer = asyncio.create_task(client.post(COMPLETIONS, json={"prompt": "x"}, headers=headers))
        engine.submitted.clear()
        await engine.submitted.wait()
        engine.streams[-1].push(Finish(0, "length"), Done(Usage(1, 0, 0, None)))
        assert (await answer).status_code == 200


@pytest.mark.parametrize("header", [{"Authorization": "bearer  one"}, {"X-Api-Key": "one"}])
async def test_other_spelling_of_a_key_is_no_other_key(
    make_client: MakeClient, engine: FakeEngine, header: dict[str, str]
) -> None:
    engine.script = lambda request: []
    client = make_client(api_key=["one"], max_concurrency_per_key=1)
    first = client.post(COMPLETIONS, json={"prompt": "x"}, headers={"Authorization": "Bearer one"})
    running = asyncio.create_task(first)
    await engine.submitted.wait()
    assert (await client.post(COMPLETIONS, json={"prompt": "x"}, headers=header)).status_code == 429
    engine.streams[0].push(Finish(0, "length"), Done(Usage(1, 0, 0, None)))
    assert (await running).status_code == 200


@pytest.mark.parametrize("key", ["one", "three", "wrong", "", "o", "one" * 100])
async def test_every_key_is_compared_whatever_the_given_one_is(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    compared: list[tuple[int, int]] = []
    compare = hmac.compare_digest

    def counting(given: bytes, known: bytes) -> bool:
        compared.append((len(given), len(known)))
        return compare(given, known)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    client = make_client(api_key=["one", "two", "three"])
    response = await client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
    assert response.status_code == (200 if key in ("one", "three") else 401)
    assert compared == [(32, 32)] * 3  # digests of one length, all of them


async def test_health_needs_no_key(make_client: MakeClient) -> None:
    assert (await make_client(api_key=["one"]).get("/health")).status_code == 200


async def test_too_large_body_is_refused_whether_declared_or_not(make_client: MakeClient) -> None:
    client = make_client(max_body_bytes=100)

    async def chunks():  # type: ignore[no-untyped-def]
        for _ in range(20):
            yield b"x" * 10

    for content in (b"x" * 101, chunks()):
        response = await client.post(COMPLETIONS, content=content, headers={"Content-Type": "application/json"})
        assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")


async def test_body_of_the_largest_size_passes(make_client: MakeClient) -> None:
    body = b'{"prompt": "x"}'
    client = make_client(max_body_bytes=len(body))
    headers = {"Content-Type": "application/json"}
    assert (await client.post(COMPLETIONS, content=body, headers=headers)).status_code == 200


async def test_cors_is_off_unless_configured(make_client: MakeClient) -> None:
    headers = {"Origin": "https://page.example"}
    assert "access-control-allow-origin" not in (await make_client().get("/health", headers=headers)).headers
    allowed = await make_client(cors_allow_origins=["https://page.example"]).get("/health", headers=headers)
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_preflight_needs_no_key(make_client: MakeClient, method: str) -> None:
    client = make_client(cors_allow_origins=["*"], api_key=["one"])
    headers = {"Origin": "https://page.example", "Access-Control-Request-Method": method}
    assert (await client.options("/v1/chat/completions", headers=headers)).status_code == 200
