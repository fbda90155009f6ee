"""`/v1/sessions`: what is asked of the engine, whose sessions are seen, and how refusals are told."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from server.engine.events import Failure
from server.engine.session_info import SessionKey
from server.errors import MemoryExhaustedError, RateLimitError
from tests.server.api.sse_reader import read
from tests.server.fake_engine import FakeEngine, says

PATH = "/v1/sessions"
MESSAGES = [{"role": "system", "content": "the quick brown fox " * 20}]


async def create(client: httpx.AsyncClient, name: str = "doc", **fields: Any) -> httpx.Response:
    return await client.post(PATH, json={"id": name, "messages": MESSAGES} | fields)


# --- reading ahead --------------------------------------------------------------------------------------


async def test_a_document_is_read_without_generating(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    response = await create(client)
    assert response.status_code == 200
    (request,) = engine.requests
    assert (request.sampling.max_tokens, request.session) == (0, SessionKey("", "", "doc"))
    body = response.json()
    assert (body["object"], body["id"], body["tokens"]) == ("session", "doc", len(request.prompt_token_ids))
    assert (await client.get(f"{PATH}/doc")).json() == body


@pytest.mark.parametrize("more", [{}, {"tools": [{"type": "function", "function": {"name": "f"}}]}])
async def test_what_is_read_begins_every_later_prompt(
    client: httpx.AsyncClient, engine: FakeEngine, more: dict[str, Any]
) -> None:
    await create(client, **more)
    question = {"role": "user", "content": "why?"}
    await client.post("/v1/chat/completions", json={"messages": [*MESSAGES, question], "max_tokens": 3, **more})
    ahead, later = (request.prompt_token_ids for request in engine.requests)
    assert later[: len(ahead)] == ahead
    assert len(later) - len(ahead) < 30


async def test_templates_that_want_a_user_are_read_up_to_the_user(
    make_client: Any, engine: FakeEngine, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = "{% if messages[-1]['role'] != 'user' %}{{ raise_exception('no user') }}{% endif %}" + (
        tokenizer.chat_template
    )
    monkeypatch.setattr(tokenizer, "_chat_template", strict)
    client = make_client(tokenizer)
    assert (await create(client)).status_code == 200
    question = {"role": "user", "content": "why?"}
    await client.post("/v1/chat/completions", json={"messages": [*MESSAGES, question]})
    ahead, later = (request.prompt_token_ids for request in engine.requests)
    assert later[: len(ahead)] == ahead
    monkeypatch.setattr(tokenizer, "_chat_template", "{{ raise_exception('never') }}")
    response = await create(client)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")


async def test_a_prompt_is_text_or_token_ids(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for prompt in ("the quick fox", [5, 6, 7]):
        assert (await client.post(PATH, json={"prompt": prompt})).status_code == 200
    assert engine.requests[1].prompt_token_ids == (5, 6, 7)
    names = [request.session_id for request in engine.requests]
    assert all(name is not None and name.startswith("sess_") for name in names)
    assert len(set(names)) == 2


async def test_a_stream_tells_progress_then_the_session(
    client: httpx.AsyncClient, engine: FakeEngine, tokenizer: Any
) -> None:
    engine.script = says(tokenizer, "", has_progress=True)
    events, _ = await read(client, PATH, {"id": "doc", "messages": MESSAGES})
    *progress, session, done = events
    assert [event["object"] for event in progress] == ["session.progress"] * 3
    shares = [event["prefilled_tokens"] / event["prompt_tokens"] for event in progress]
    assert shares == sorted(shares)
    assert (session["object"], session["id"], done) == ("session", "doc", "[DONE]")


async def test_in_the_background_the_answer_comes_before_the_end(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = lambda request: []
    response = await asyncio.wait_for(create(client, background=True), 10)
    assert (response.status_code, response.json()["id"]) == (202, "doc")
    assert engine.streams[0].num_aborts == 0


async def test_a_caller_who_leaves_ends_the_prefill(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = lambda request: []
    call = asyncio.create_task(create(client))
    await engine.submitted.wait()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    for _ in range(100):
        if engine.streams[0].num_aborts:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("still running")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, None),
        ({"prompt": "x", "messages": MESSAGES}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt[0]"),
        ({"prompt": "x", "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"prompt": "x", "stream": True, "background": True}, "stream"),
        ({"prompt": "x", "id": ""}, "id"),
        ({"prompt": "x", "id": "a\nb"}, "id"),
        ({"prompt": "x", "id": "a" * 513}, "id"),
        ({"prompt": "x", "max_tokens": 5}, "max_tokens"),
        ({"messages": []}, "messages"),
    ],
)
async def test_wrong_prefills_are_refused_by_name(
    client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], param: str | None
) -> None:
    response = await client.post(PATH, json=fields)
    assert response.status_code == 400, response.text
    assert param is None or response.json()["error"]["param"] == param
    assert engine.requests == []


@pytest.mark.parametrize("how", [{}, {"background": True}, {"stream": True}])
async def test_what_the_engine_refuses_is_a_status(
    client: httpx.AsyncClient, engine: FakeEngine, how: dict[str, Any]
) -> None:
    engine.refusal = RateLimitError("full", retry_after_seconds=1)
    response = await create(client, **how)
    assert (response.status_code, response.headers["Retry-After"]) == (429, "1")
    engine.refusal = None
    engine.script = lambda request: [Failure(MemoryExhaustedError("too much"))]
    if how != {"background": True}:
        assert (await create(client, **how)).json()["error"]["code"] == "kv_memory_exhausted"


# --- sessions by name -----------------------------------------------------------------------------------


async def test_every_endpoint_names_sessions(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    hello = [{"role": "user", "content": "hello"}]
    named = {"prompt_cache_key": "k"}
    await client.post("/v1/chat/completions", json={"messages": hello} | named)
    await client.post("/v1/completions", json={"prompt": "hello"} | named)
    await client.post("/v1/responses", json={"input": "hello"} | named)
    header = {"X-Session-Id": "k", "X-Cache-Salt": "s"}
    await client.post("/v1/messages", json={"messages": hello, "max_tokens": 5}, headers=header)
    await client.post("/v1/responses", json={"input": "hello"}, headers=header)
    await client.post("/v1/chat/completions", json={"messages": hello, "cache_salt": "body"}, headers=header)
    keys = [request.session for request in engine.requests]
    plain, salted = SessionKey("", "", "k"), SessionKey("", "s", "k")
    assert keys == [plain, plain, plain, salted, salted, SessionKey("", "body", "k")]


async def test_lists_come_in_pages(client: httpx.AsyncClient) -> None:
    for i in range(5):
        await create(client, f"s{i}")
    everything = (await client.get(PATH)).json()
    assert [session["id"] for session in everything["data"]] == ["s4", "s3", "s2", "s1", "s0"]
    assert (everything["object"], everything["has_more"], everything["total"]) == ("list", False, 5)
    page = (await client.get(PATH, params={"limit": 2, "after": "s3"})).json()
    assert [session["id"] for session in page["data"]] == ["s2", "s1"]
    assert (page["first_id"], page["last_id"], page["has_more"]) == ("s2", "s1", True)
    empty = (await client.get(PATH, headers={"X-Cache-Salt": "other"})).json()
    assert (empty["data"], empty["first_id"], empty["total"]) == ([], None, 0)
    assert (await client.get(PATH, params={"after": "s9"})).status_code == 404
    assert (await client.get(PATH, params={"limit": 0})).json()["error"]["param"] == "limit"


@pytest.mark.parametrize("name", ["a/b", "a b", "..", "a/../../b", "ü", "x/pin", "?#%", "a" * 512])
async def test_any_name_is_found_by_its_percent_encoding(client: httpx.AsyncClient, name: str) -> None:
    assert (await create(client, name)).json()["id"] == name
    path = f"{PATH}/{quote(name, safe='').replace('..', '%2E%2E')}"
    assert (await client.get(path)).json()["id"] == name
    assert (await client.post(f"{path}/pin", json={"ttl_seconds": 5})).json()["pinned"] is True
    assert (await client.post(f"{path}/fork", json={"id": "twin"})).json()["id"] == "twin"
    deleted = (await client.delete(path)).json()
    assert (deleted["id"], deleted["object"], deleted["deleted"]) == (name, "session.deleted", True)
    assert (await client.get(path)).status_code == 404
    assert (await client.get(f"{PATH}/twin")).status_code == 200


async def test_pins_take_a_time_or_none(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await create(client)
    for body in ({"ttl_seconds": 60}, {"ttl_seconds": 0}, {"ttl_seconds": None}, {}):
        assert (await client.post(f"{PATH}/doc/pin", json=body)).status_code == 200
    assert (await client.post(f"{PATH}/doc/pin")).status_code == 200
    assert [asked[2] for asked in engine.sessions.asked] == [60, 0, None, None, None]
    for wrong in (-1, "x", 1e300, True):
        response = await client.post(f"{PATH}/doc/pin", json={"ttl_seconds": wrong})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "ttl_seconds")


async def test_refusals_keep_their_status_and_code(client: httpx.AsyncClient) -> None:
    await create(client)
    calls = [
        (client.get(f"{PATH}/none"), 404, "session_not_found"),
        (client.delete(f"{PATH}/none"), 404, "session_not_found"),
        (client.post(f"{PATH}/none/restore"), 404, "session_not_found"),
        (client.post(f"{PATH}/doc/fork", json={"id": "doc"}), 409, "session_exists"),
        (client.post(f"{PATH}/doc/save"), 400, "kv_disk_unavailable"),
    ]
    for call, status, code in calls:
        response = await call
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert (await client.post(f"{PATH}/doc/restore")).json()["id"] == "doc"
    assert (await client.post(f"{PATH}/doc/fork")).json()["id"].startswith("sess_")


async def test_keys_do_not_see_each_others_sessions(make_client: Any, engine: FakeEngine) -> None:
    client = make_client(api_key=["key-a", "key-b"])
    ours, theirs = ({"Authorization": f"Bearer {key}"} for key in ("key-a", "key-b"))
    await client.post(PATH, json={"id": "doc", "prompt": "x"}, headers=ours)
    await client.post("/v1/chat/completions", json={"messages": MESSAGES, "prompt_cache_key": "doc"}, headers=theirs)
    first, second = (request.session for request in engine.requests)
    assert first is not None
    assert second is not None
    assert first.owner != second.owner
    assert "key-a" not in first.owner
    engine.sessions.known.pop(second)
    assert (await client.get(f"{PATH}/doc", headers=theirs)).status_code == 404
    assert (await client.get(PATH, headers=theirs)).json()["total"] == 0
    anthropic = {"X-Api-Key": "key-a"}
    assert (await client.get(f"{PATH}/doc", headers=anthropic)).status_code == 200
    assert (await client.get(PATH)).status_code == 401
