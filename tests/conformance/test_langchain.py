"""LangChain's ChatOpenAI against a running server, with only its URL and key changed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from server.engine.events import Failure, Token
from server.errors import ContextLengthError, MemoryExhaustedError, RateLimitError
from tests.conformance.conftest import API_KEY, Running
from tests.server.fake_engine import says

# its own code calls what pydantic and the interpreter have deprecated
pytestmark = pytest.mark.filterwarnings("ignore")

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "%s"}}\n</tool_call>'
MakeChat = Callable[..., Any]


class Animal(BaseModel):
    """An animal."""

    name: str
    legs: int


def weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


@pytest.fixture
async def make_chat(server: Running, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[MakeChat]:
    """`make_chat(**fields)`: a ChatOpenAI of this server."""
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    from langchain_openai import ChatOpenAI

    with httpx.Client() as client:
        async with httpx.AsyncClient() as async_client:
            settings = {
                "model": "demo",
                "base_url": f"{server.url}/v1",
                "api_key": API_KEY,
                "max_retries": 0,
                "http_client": client,
                "http_async_client": async_client,
            }
            yield lambda **fields: ChatOpenAI(**settings | fields)


@pytest.fixture
def chat(make_chat: MakeChat) -> Any:
    return make_chat()


def test_chat(chat: Any) -> None:
    answer = chat.invoke([("system", "be brief"), ("human", "hello")])
    assert answer.content == "the quick brown fox"
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata["input_token_details"]["cache_read"] == 2


async def test_chat_async_and_batch(chat: Any) -> None:
    assert (await chat.ainvoke("hello")).content == "the quick brown fox"
    assert [a.content for a in chat.batch(["a", "b"])] == ["the quick brown fox"] * 2


def test_fields_reach_the_engine(make_chat: MakeChat, server: Running) -> None:
    chat = make_chat(
        temperature=0.5, max_tokens=9, seed=3, top_p=0.9, stop=["dog"], presence_penalty=0.1, frequency_penalty=0.2,
        logit_bias={5: 1}, n=2, extra_body={"top_k": 7, "min_p": 0.1},
    )  # fmt: skip
    from langchain_core.messages import HumanMessage

    answers = chat.generate([[HumanMessage("hello")]]).generations[0]
    assert len(answers) == 2
    sampling = server.engine.requests[0].sampling
    assert (sampling.temperature, sampling.max_tokens, sampling.seed, sampling.top_p) == (0.5, 9, 3, 0.9)
    assert (sampling.top_k, sampling.min_p, sampling.logit_bias, sampling.n) == (7, 0.1, ((5, 1),), 2)


def test_logprobs(make_chat: MakeChat) -> None:
    answer = make_chat(logprobs=True, top_logprobs=2).invoke("hello")
    content = answer.response_metadata["logprobs"]["content"]
    assert "".join(token["token"] for token in content) == "the quick brown fox"
    assert {len(token["top_logprobs"]) for token in content} == {2}


def test_stream(make_chat: MakeChat) -> None:
    chunks = list(make_chat(stream_usage=True).stream("hello"))
    assert len(chunks) > 3
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.content == "the quick brown fox"
    assert whole.usage_metadata["total_tokens"] > 0
    assert whole.response_metadata["finish_reason"] == "stop"


@pytest.mark.parametrize("is_stream", [False, True])
def test_parallel_tools_chosen_by_the_model(chat: Any, server: Running, is_stream: bool) -> None:
    server.engine.script = says(server.tokenizer, CALL % "Rome" + "\n" + CALL % "Oslo")
    bound = chat.bind_tools([weather])
    if is_stream:
        first, *rest = bound.stream("hello")
        for chunk in rest:
            first += chunk
        answer = first
    else:
        answer = bound.invoke("hello")
    assert [(c["name"], c["args"]) for c in answer.tool_calls] == [
        ("weather", {"city": "Rome"}),
        ("weather", {"city": "Oslo"}),
    ]
    assert len({call["id"] for call in answer.tool_calls}) == 2
    server.engine.script = says(server.tokenizer, "it is sunny")
    results = [("tool", weather(**call["args"]), call["id"]) for call in answer.tool_calls]
    from langchain_core.messages import AIMessage, ToolMessage

    called = AIMessage(content=answer.content, tool_calls=answer.tool_calls)
    told = [ToolMessage(content=text, tool_call_id=call_id) for _, text, call_id in results]
    assert bound.invoke([("human", "hello"), called, *told]).content == "it is sunny"


def test_required_and_named_tools(chat: Any, server: Running) -> None:
    calls = '[{"name": "weather", "parameters": {"city": "Rome"}}, {"name": "weather", "parameters": {"city": "Oslo"}}]'
    server.engine.script = says(server.tokenizer, calls)
    answer = chat.bind_tools([weather], tool_choice="required").invoke("hello")
    assert [call["args"]["city"] for call in answer.tool_calls] == ["Rome", "Oslo"]
    server.engine.script = says(server.tokenizer, '{"city": "Rome"}')
    answer = chat.bind_tools([weather], tool_choice="weather", parallel_tool_calls=False).invoke("hello")
    assert [(call["name"], call["args"]) for call in answer.tool_calls] == [("weather", {"city": "Rome"})]
    assert all(request.make_constraint is not None for request in server.engine.requests)


@pytest.mark.parametrize("method", ["json_schema", "json_mode", "function_calling"])
def test_structured_output(chat: Any, server: Running, method: str) -> None:
    server.engine.script = says(server.tokenizer, '{"name": "fox", "legs": 4}')
    answer = chat.with_structured_output(Animal, method=method).invoke("hello")
    assert answer == Animal(name="fox", legs=4)
    assert server.engine.requests[0].make_constraint is not None


def test_errors_become_the_sdks_exceptions(make_chat: MakeChat, server: Running) -> None:
    with pytest.raises(openai.NotFoundError):
        make_chat(model="gpt-9").invoke("hello")
    with pytest.raises(openai.AuthenticationError):
        make_chat(api_key="wrong").invoke("hello")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        make_chat(temperature=3).invoke("hello")
    for refusal, expected in (
        (RateLimitError("full", retry_after_seconds=1), openai.RateLimitError),
        (MemoryExhaustedError("too much"), openai.InternalServerError),
        (ContextLengthError("too long"), openai.BadRequestError),
    ):
        server.engine.refusal = refusal
        with pytest.raises(expected):
            make_chat().invoke("hello")
        with pytest.raises(expected):
            list(make_chat().stream("hello"))


def test_error_after_the_stream_began_is_raised(chat: Any, server: Running) -> None:
    x = 3 + ord("x") - ord("!")
    server.engine.script = lambda request: [Token(0, x), Failure(MemoryExhaustedError("too much"))]
    received = ""
    with pytest.raises(openai.APIError, match="too much"):
        for chunk in chat.stream("hello"):
            received += chunk.content
    assert received == "x"


def test_responses_api(make_chat: MakeChat, server: Running) -> None:
    chat = make_chat(use_responses_api=True)
    assert chat.invoke("hello").text == "the quick brown fox"
    assert "".join(chunk.text for chunk in chat.stream("hello")) == "the quick brown fox"
    server.engine.script = says(server.tokenizer, CALL % "Rome")
    (call,) = chat.bind_tools([weather]).invoke("hello").tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": "Rome"})
