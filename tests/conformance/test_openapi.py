"""The server keeps to its own OpenAPI document, and survives what no document foresees."""

from __future__ import annotations

import json
import random
from typing import Any

import httpx
import pytest

from server.app import create_app
from server.config import Settings
from server.metrics import Metrics
from tests.conftest import byte_level_tokenizer
from tests.server.fake_engine import FakeEngine, says

MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": MESSAGES,
        "tools": [TOOL],
        "stop": ["a"],
        "logit_bias": {"1": 1},
        "stream": True,
    },
    "/v1/completions": {"prompt": [[5, 6], [7]], "n": 2, "logprobs": 1, "max_tokens": 5},
    "/v1/responses": {"input": [{"role": "user", "content": "x"}], "text": {"format": {"type": "json_object"}}},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 5, "system": "x", "tool_choice": {"type": "auto"}},
    "/v1/sessions": {"id": "doc", "messages": MESSAGES, "cache_salt": "a", "background": True},
    "/v1/sessions/doc/pin": {"ttl_seconds": 60},
    "/v1/sessions/doc/fork": {"id": "twin"},
    "/tokenize": {"prompt": "x", "add_special_tokens": True},
    "/detokenize": {"tokens": [5, 6]},
}
JUNK: list[Any] = [
    None,
    True,
    -1,
    0,
    2**63,
    1e308,
    "",
    "x",
    "\x00",
    "\ud800",
    [],
    [[]],
    {},
    {"type": "object"},
    [None] * 9,
]


def make_app() -> Any:
    tokenizer = byte_level_tokenizer()
    return create_app(Settings(), FakeEngine(says(tokenizer, "the quick fox")), tokenizer, Metrics())


def mutated(value: Any, rng: random.Random) -> Any:
    """`value` with one thing in it replaced, dropped, doubled or added."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        if rng.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        if rng.random() < 0.15:
            return value | {rng.choice(["user", "seed", "x", "", "\ud800", "response_format"]): rng.choice(JUNK)}
        return value | {key: mutated(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return value + value[at:] if rng.random() < 0.2 else [*value[:at], mutated(value[at], rng), *value[at + 1 :]]
    return rng.choice(JUNK)


def encoded(value: Any, rng: random.Random) -> bytes:
    """As JSON, sometimes cut, spoilt or nested."""
    body = json.dumps(value).encode()
    kind = rng.random()
    if kind < 0.05:
        return body[: rng.randrange(len(body) + 1)]
    if kind < 0.1:
        at = rng.randrange(len(body) + 1)
        return body[:at] + bytes([rng.randrange(256)]) + body[at:]
    if kind < 0.12:
        return b'{"x":' * 5000 + body
    return body


async def send_mutants(number: int) -> None:
    rng = random.Random(0)
    transport = httpx.ASGITransport(make_app(), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        for _ in range(number):
            path, body = rng.choice(list(BODIES.items()))
            for _ in range(rng.randint(1, 3)):
                body = mutated(body, rng)
            content = encoded(body, rng)
            response = await client.post(path, content=content, headers={"Content-Type": "application/json"})
            assert response.status_code in (200, 202, 400, 404, 409), (path, content, response.text)
            assert "internal_error" not in response.text  # also within a stream
            if response.status_code >= 400:
                assert response.json()["error"]["message"]


async def test_mutated_bodies_never_reach_a_defect() -> None:
    await send_mutants(500)


@pytest.mark.slow
async def test_many_mutated_bodies_never_reach_a_defect() -> None:
    await send_mutants(10_000)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_server_keeps_to_its_openapi_document() -> None:
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    schema = schemathesis.openapi.from_asgi("/openapi.json", make_app())
    for operation in schema.get_all_operations():

        @given(operation.ok().as_strategy())
        @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
        def check(case: Any) -> None:
            # fields that exclude each other cannot be told in a schema: a 400 may be the answer to valid data
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

        check()
