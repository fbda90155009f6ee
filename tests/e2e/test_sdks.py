"""The real SDKs against a real server over the bundled model: what only an engine can get right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import pytest
from anthropic import Anthropic
from openai import OpenAI
from pydantic import BaseModel, Field

MESSAGES = [{"role": "user", "content": "Tell me of the quiet harbor."}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}


class Trip(BaseModel):
    """A trip."""

    city: Literal["Rome", "Oslo"]
    days: int = Field(ge=1, le=9)


@pytest.fixture
def client(server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ended(server) -> dict[str, float]:
    """Requests so far by their end."""
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if line.startswith("retrieval_request_success_total")]
    return {name.split('"')[1]: float(value) for name, value in pairs}


def check_call(name: str, arguments: str | dict[str, Any]) -> None:
    assert name == "weather"
    Trip.model_validate(json.loads(arguments) if isinstance(arguments, str) else arguments)


def test_stream_says_what_the_whole_answer_says(client: OpenAI) -> None:
    fields: Any = {"model": "demo", "messages": MESSAGES, "temperature": 0, "max_tokens": 20}
    whole = client.chat.completions.create(**fields)
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices) == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_calls_that_are_required_follow_their_schema(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, tools=[TOOL], tool_choice="required", max_tokens=400, seed=1,
        parallel_tool_calls=False,
    )  # fmt: skip
    (call,) = answer.choices[0].message.tool_calls
    check_call(call.function.name, call.function.arguments)
    assert answer.choices[0].finish_reason == "tool_calls"
    named = {"type": "function", "function": {"name": "weather"}}
    with client.chat.completions.stream(
        model="demo", messages=MESSAGES, tools=[TOOL], tool_choice=named, max_tokens=400, seed=2
    ) as stream:
        for _ in stream:
            pass
        (call,) = stream.get_final_completion().choices[0].message.tool_calls
    check_call(call.function.name, call.function.arguments)


def test_json_schema_by_a_pydantic_model(client: OpenAI) -> None:
    fields: Any = {"model": "demo", "messages": MESSAGES, "response_format": Trip, "max_tokens": 400, "n": 3, "seed": 3}
    answer = client.chat.completions.parse(**fields)
    assert all(isinstance(choice.message.parsed, Trip) for choice in answer.choices)
    answer = client.responses.parse(model="demo", input="Where to?", text_format=Trip, max_output_tokens=400)
    assert isinstance(answer.output_parsed, Trip)


def test_echoed_logprobs_are_those_of_the_answer_when_it_was_made(client: OpenAI) -> None:
    """Decoding against reading, in bfloat16: they round otherwise."""
    (prompt,) = [httpx.post(f"{client.base_url}".replace("/v1/", "/tokenize"), json={"prompt": "The sky is"}).json()]
    made = client.completions.create(model="demo", prompt=prompt["tokens"], max_tokens=8, temperature=0, logprobs=1)
    text = made.choices[0]
    answer = httpx.post(f"{client.base_url}".replace("/v1/", "/tokenize"), json={"prompt": text.text})
    tokens = prompt["tokens"] + answer.json()["tokens"]
    read = client.completions.create(model="demo", prompt=tokens, max_tokens=0, echo=True, logprobs=1).choices[0]
    assert read.logprobs.token_logprobs[0] is None
    assert read.logprobs.tokens[-len(text.logprobs.tokens) :] == text.logprobs.tokens
    ours, theirs = read.logprobs.token_logprobs[-len(text.logprobs.tokens) :], text.logprobs.token_logprobs
    assert ours == pytest.approx(theirs, abs=0.15)


def test_best_of_beats_or_equals_the_first(client: OpenAI) -> None:
    def mean(choice: Any) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    fields: Any = {
        "model": "demo",
        "prompt": "The sky is",
        "max_tokens": 6,
        "seed": 5,
        "logprobs": 0,
        "temperature": 1.5,
    }
    every = client.completions.create(**fields, n=4)
    (chosen,) = client.completions.create(**fields, extra_body={"best_of": 4}).choices
    assert mean(chosen) == pytest.approx(max(mean(choice) for choice in every.choices), abs=1e-3)


def test_stop_string_counts_as_a_stop_and_ends_one_choice_only(client: OpenAI, server) -> None:
    before = ended(server)
    fields: Any = {"model": "demo", "messages": MESSAGES, "max_tokens": 60, "n": 3, "seed": 6, "temperature": 1.5}
    answer = client.chat.completions.create(**fields, stop=["a", "e", "i"], extra_body={"ignore_eos": True})
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    assert answer.usage.model_extra["retrieval_details"]["share_scanned"] is not None
    after = ended(server)
    assert after["stop"] == before["stop"] + 1
    assert after["abort"] == before["abort"]


def test_anthropics_sdk(server) -> None:
    tool = {"name": "weather", "description": "of a city", "input_schema": PARAMETERS}
    with Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        fields: Any = {"model": "demo", "max_tokens": 400, "messages": MESSAGES}
        with client.messages.stream(**fields, extra_body={"temperature": 0}) as stream:
            text = "".join(stream.text_stream)
        assert client.messages.create(**fields, extra_body={"temperature": 0}).content[0].text == text
        answer = client.messages.create(**fields, tools=[tool], tool_choice={"type": "tool", "name": "weather"})
        check_call(answer.content[-1].name, answer.content[-1].input)


@pytest.mark.filterwarnings("ignore")
def test_langchain(server) -> None:
    from langchain_openai import ChatOpenAI

    with httpx.Client() as http:
        chat = ChatOpenAI(
            model="demo", base_url=f"{server.url}/v1", api_key="none", http_client=http, max_tokens=400, temperature=0
        )
        assert "".join(chunk.text for chunk in chat.stream("hello")) == chat.invoke("hello").text
        for method in ("json_schema", "function_calling"):
            assert isinstance(chat.with_structured_output(Trip, method=method).invoke("Where to?"), Trip)


@pytest.mark.filterwarnings("ignore")
def test_litellm(server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    with OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        fields: Any = {
            "model": "openai/demo",
            "messages": MESSAGES,
            "max_tokens": 400,
            "client": client,
            "temperature": 0,
        }
        whole = litellm.completion(**fields)
        streamed = litellm.stream_chunk_builder(list(litellm.completion(**fields, stream=True)))
        assert streamed.choices[0].message.content == whole.choices[0].message.content
        answer = litellm.completion(**fields, response_format=Trip)
        Trip.model_validate_json(answer.choices[0].message.content)
        tools: Any = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
        (call,) = litellm.completion(**fields, **tools).choices[0].message.tool_calls
        check_call(call.function.name, call.function.arguments)
