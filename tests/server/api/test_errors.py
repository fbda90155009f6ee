"""Every way to be wrong ends in OpenAI's envelope, with the right status and the field's name."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from server.errors import ContextLengthError
from tests.server.conftest import MakeClient
from tests.server.fake_engine import FakeEngine

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": True}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": 7}, "stop"),
        ({"stop_token_ids": [99999]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"colour": 1}}, "stream_options.colour"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"prompt_cache_key": ""}, "prompt_cache_key"),
    ],
)
async def test_wrong_field_is_named(client: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    response = await client.post(CHAT, json=HELLO | fields)
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"] == param, error
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 2}, "best_of"),
        ({"audio": {"voice": "alloy"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"bad_words": ["x"]}, "bad_words"),
        ({"store": True}, "store"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"messages": [{"role": "user", "content": "x", "audio": {"id": "1"}}]}, "messages[0].audio"),
    ],
)
async def test_unsupported_field_is_named(client: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    response = await client.post(CHAT, json=HELLO | fields)
    assert response.status_code == 400
    assert error_of(response) | {"message": ""} == {
        "message": "",
        "type": "invalid_request_error",
        "param": param,
        "code": "unsupported_parameter",
    }


async def test_image_is_refused_and_named(client: httpx.AsyncClient) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:"}}
    response = await client.post(CHAT, json={"messages": [{"role": "user", "content": [part]}]})
    assert response.status_code == 400
    assert str(error_of(response)["param"]).startswith("messages[0].content")


async def test_unknown_field_is_named(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, json=HELLO | {"temprature": 1})
    error = error_of(response)
    assert (response.status_code, error["param"], error["code"]) == (400, "temprature", "unknown_parameter")


async def test_null_and_neutral_values_ask_for_nothing(client: httpx.AsyncClient) -> None:
    fields = {"tools": None, "response_format": {"type": "text"}, "store": False, "temperature": None, "stop": None}
    assert (await client.post(CHAT, json=HELLO | fields)).status_code == 200


async def test_unknown_model_is_not_found(client: httpx.AsyncClient) -> None:
    for path, body in ((CHAT, HELLO), ("/v1/completions", {"prompt": "x"}), ("/tokenize", {"prompt": "x"})):
        response = await client.post(path, json=body | {"model": "gpt-9"})
        error = error_of(response)
        assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")


async def test_too_long_prompt_names_both_numbers(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.refusal = ContextLengthError("at most 10 tokens, the prompt has 11", param="messages")
    response = await client.post(CHAT, json=HELLO | {"stream": True})
    assert (response.status_code, error_of(response)["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"messages": [}',
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"messages": NaN}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"seed": 1' + b"0" * 6000 + b"}",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    ],
)
async def test_malformed_body_is_a_bad_request(client: httpx.AsyncClient, body: bytes) -> None:
    response = await client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    error_of(response)


@pytest.mark.parametrize("items", [[], [{"type": "reasoning"}]])
async def test_response_to_nothing_is_a_bad_request(client: httpx.AsyncClient, items: list[Any]) -> None:
    response = await client.post("/v1/responses", json={"input": items})
    assert (response.status_code, error_of(response)["param"]) == (400, "input")


async def test_not_a_number_is_refused(client: httpx.AsyncClient) -> None:
    body = json.dumps(HELLO | {"temperature": float("nan")}).encode()
    response = await client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert (response.status_code, error_of(response)["param"]) == (400, "temperature")


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"x": [value]}
    return {"type": "object", "default": value}


DEEP = nested(100)
FUNCTION = {"name": "f", "parameters": DEEP}


async def test_deeply_nested_template_arguments_are_refused(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, json=HELLO | {"chat_template_kwargs": DEEP})
    assert (response.status_code, error_of(response)["param"]) == (400, "chat_template_kwargs")


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"guided_json": DEEP}),
        (CHAT, {"structured_outputs": {"json": DEEP}}),
        (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": DEEP}}}),
        (CHAT, {"tools": [{"type": "function", "function": FUNCTION}]}),
        ("/v1/responses", {"input": "x", "tools": [{"type": "function", **FUNCTION}]}),
        ("/v1/responses", {"input": "x", "text": {"format": {"type": "json_schema", "name": "n", "schema": DEEP}}}),
        ("/v1/messages", {"max_tokens": 5, "tools": [{"name": "f", "input_schema": DEEP}]}),
        ("/tokenize", {"tools": [{"type": "function", "function": FUNCTION}]}),
        ("/v1/sessions", {"chat_template_kwargs": DEEP}),
    ],
)
async def test_free_json_may_not_nest_deeply_anywhere(
    client: httpx.AsyncClient, path: str, fields: dict[str, Any]
) -> None:
    body = fields if "input" in fields else HELLO | fields
    response = await client.post(path, json=body)
    assert response.status_code == 400
    assert "nested deeper" in response.json()["error"]["message"]


@pytest.mark.parametrize("name", ["..%2f..%2fetc%2fpasswd", "%2fetc%2fpasswd", "a%00b", "demo%2f..%2fdemo"])
async def test_path_names_a_model_and_no_file(client: httpx.AsyncClient, name: str) -> None:
    response = await client.get(f"/v1/models/{name}")
    assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")


async def test_body_of_another_type_is_a_bad_request(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, content=b"a=1", headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert response.status_code == 400
    error_of(response)


async def test_unknown_route_and_method_have_envelopes(client: httpx.AsyncClient) -> None:
    assert error_of(await client.get("/nowhere"))["code"] == "not_found"
    response = await client.get(CHAT)
    assert response.status_code == 405
    assert error_of(response)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


async def test_defect_is_a_500_that_tells_nothing(make_client: MakeClient, engine: FakeEngine) -> None:
    def fail(request: object) -> Any:
        raise RuntimeError("secret")

    engine.script = fail
    response = await make_client().post(CHAT, json=HELLO, headers={"X-Request-Id": "mine"})
    assert response.status_code == 500
    assert error_of(response)["code"] == "internal_error"
    assert "secret" not in response.text
    assert response.headers["x-request-id"] == "mine"
