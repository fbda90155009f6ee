"""Tools: told to the model, enforced by grammar, read from its answer."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from server.engine.tokenizer import Tokenizer
from tests.conftest import byte_level_tokenizer
from tests.server.api.sse_reader import read
from tests.server.api.test_structure import draws
from tests.server.conftest import MakeClient
from tests.server.fake_engine import FakeEngine, says

PATH = "/v1/chat/completions"
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": PARAMETERS}}
OTHER = {"type": "function", "function": {"name": "time"}}
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "tools": [TOOL, OTHER]}
CALLING = 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


def prompt_of(engine: FakeEngine, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(engine.requests[-1].prompt_token_ids, skip_special_tokens=False)


async def test_call_is_read_from_the_answer(
    client: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    engine.script = says(tokenizer, CALLING)
    (choice,) = (await client.post(PATH, json=HELLO)).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "I look.\n"
    (call,) = choice["message"]["tool_calls"]
    assert call["id"].startswith("call_")
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}


async def test_call_is_streamed_name_first(client: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    engine.script = says(tokenizer, CALLING)
    events, _ = await read(client, PATH, HELLO)
    deltas = [event["choices"][0]["delta"] for event in events[:-1]]
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert calls[0]["function"] == {"name": "weather", "arguments": ""}
    assert calls[0]["id"].startswith("call_")
    assert "".join(call["function"]["arguments"] for call in calls) == '{"city": "Rome"}'
    assert len(calls) > 2
    assert events[-2]["choices"][0]["finish_reason"] == "tool_calls"


async def test_answer_without_a_call_is_content(client: httpx.AsyncClient) -> None:
    (choice,) = (await client.post(PATH, json=HELLO)).json()["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"] == {"role": "assistant", "content": "the quick brown fox", "refusal": None}


@pytest.mark.parametrize("is_stream", [False, True])
async def test_required_choice_enforces_calls(
    client: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer, is_stream: bool
) -> None:
    engine.script = draws(tokenizer)
    body = HELLO | {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    if is_stream:
        events, _ = await read(client, PATH, body)
        calls = [call for event in events[:-1] for call in event["choices"][0]["delta"].get("tool_calls", [])]
        arguments, reason = (
            "".join(call["function"].get("arguments", "") for call in calls),
            events[-2]["choices"][0]["finish_reason"],
        )
    else:
        (choice,) = (await client.post(PATH, json=body)).json()["choices"]
        (call,) = choice["message"]["tool_calls"]
        arguments, reason = call["function"]["arguments"], choice["finish_reason"]
        assert choice["message"]["content"] is None
    assert json.loads(arguments)["city"] in ("Rome", "Oslo")
    assert reason == "tool_calls"


async def test_named_choice_enforces_that_function(
    client: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    engine.script = draws(tokenizer)
    body = HELLO | {"tool_choice": {"type": "function", "function": {"name": "weather"}}}
    (choice,) = (await client.post(PATH, json=body)).json()["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["city"] in ("Rome", "Oslo")
    assert choice["finish_reason"] == "stop"


async def test_template_that_knows_no_tools_is_helped(
    client: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    await client.post(PATH, json=HELLO)
    prompt = prompt_of(engine, tokenizer)
    assert prompt.startswith("<|im_start|>system\nYou may call functions.")
    assert '"name": "weather"' in prompt
    await client.post(PATH, json=HELLO | {"tool_choice": "none"})
    assert "weather" not in prompt_of(engine, tokenizer)


async def test_calls_and_their_results_are_part_of_the_conversation(
    client: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}}
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    assert (await client.post(PATH, json={"messages": messages})).status_code == 200
    prompt = prompt_of(engine, tokenizer)
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>' in prompt
    assert "<tool_response>\nsunny\n</tool_response>" in prompt


async def test_template_that_knows_tools_gets_them(make_client: MakeClient, engine: FakeEngine) -> None:
    own = byte_level_tokenizer()
    own._chat_template = (
        "{% for t in tools %}[{{ t.function.name }}]{% endfor %}"
        "{% for m in messages %}{{ m.role }}"
        "{% for c in m.tool_calls or [] %}({{ c.function.arguments.city }}){% endfor %}{% endfor %}"
    )
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}}
    messages = [*HELLO["messages"], {"role": "assistant", "tool_calls": [call]}]
    await make_client(tokenizer=own).post(PATH, json=HELLO | {"messages": messages})
    assert own.decode(engine.requests[-1].prompt_token_ids) == "[weather][time]userassistant(Rome)"


async def test_reasoning_is_told_apart(make_client: MakeClient, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    engine.script = says(tokenizer, "<think>\nhm\n</think>\n\nyes")
    client = make_client(reasoning_parser="think")
    (choice,) = (await client.post(PATH, json={"messages": HELLO["messages"]})).json()["choices"]
    assert choice["message"]["reasoning_content"] == "hm\n"
    assert choice["message"]["content"] == "yes"
    events, _ = await read(client, PATH, {"messages": HELLO["messages"]})
    deltas = [event["choices"][0]["delta"] for event in events[:-1]]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm\n"
    assert "".join(delta.get("content", "") for delta in deltas) == "yes"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "nothing"}}}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "not a name"}}]}, "tools[0].function.name"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tools"),
        (
            {
                "tool_choice": "required",
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}],
            },
            "tools",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{"}}]}
                ]
            },
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
async def test_wrong_field_is_named(client: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    response = await client.post(PATH, json=HELLO | fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
