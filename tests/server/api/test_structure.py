"""response_format, structured_outputs and guided_*: compiled for the engine, refused by name."""

from __future__ import annotations

import json
import random
from typing import Any

import httpx
import pytest

from server.engine.events import Done, Event, Finish, Token, Usage
from server.engine.request import Request
from server.engine.tokenizer import Tokenizer
from tests.server.fake_engine import FakeEngine

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
SCHEMA = {
    "type": "object",
    "properties": {"fox": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["fox"],
    "additionalProperties": False,
}


def draws(tokenizer: Tokenizer) -> Any:
    """A script that samples what the constraint allows."""

    def script(request: Request) -> list[Event]:
        rng = random.Random(0)
        events: list[Event] = []
        for choice in range(request.sampling.n):
            assert request.make_constraint is not None
            constraint = request.make_constraint()
            token_id = -1
            while token_id not in tokenizer.eos_token_ids:
                token_id = rng.choice(constraint.allowed_tokens(tokenizer.vocab_size).nonzero()[0].tolist())
                constraint.accept(token_id)
                events.append(Token(choice, token_id))
            events.append(Finish(choice, "stop", token_id))
        return [*events, Done(Usage(len(request.prompt_token_ids), 0, len(events), None))]

    return script


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "fox", "schema": SCHEMA, "strict": True}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        {"guided_json": SCHEMA},
    ],
)
async def test_schema_shapes_the_answer(
    client: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer, fields: dict[str, Any]
) -> None:
    engine.script = draws(tokenizer)
    answer = (await client.post(CHAT, json=HELLO | fields | {"n": 2})).json()
    for choice in answer["choices"]:
        assert json.loads(choice["message"]["content"])["fox"] in range(100)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"guided_choice": ["red"]}, "red"),
        ({"guided_regex": "a{3}"}, "aaa"),
        ({"guided_grammar": 'start: "x"'}, "x"),
        ({"structured_outputs": {"choice": ["red"]}}, "red"),
        ({"structured_outputs": {"regex": "b+c{0}", "json": None}}, None),
    ],
)
async def test_other_shapes(
    client: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer, fields: dict[str, Any], expected: str | None
) -> None:
    engine.script = draws(tokenizer)
    text = (await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 50} | fields)).json()
    content = text["choices"][0]["text"]
    assert content == expected or (expected is None and set(content) == {"b"})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.json_schema"),
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
    ],
)
async def test_what_cannot_be_followed_is_named(client: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    response = await client.post(CHAT, json=HELLO | fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
