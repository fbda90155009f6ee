"""LiteLLM against a running server, as a provider of OpenAI's kind, of vLLM's and of Anthropic's."""

from __future__ import annotations

import inspect
import json
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from typing import Any

import pytest
from pydantic import BaseModel

from server.engine.events import Failure, Token
from server.errors import ContextLengthError, MemoryExhaustedError, RateLimitError
from tests.conformance.conftest import API_KEY, Running
from tests.server.fake_engine import says

# its own code calls what pydantic and the interpreter have deprecated
pytestmark = pytest.mark.filterwarnings("ignore")

MESSAGES = [{"role": "user", "content": "hello"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "%s"}}\n</tool_call>'
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
Complete = Callable[..., Any]


async def close_clients(litellm: Any) -> None:
    """It keeps them for ever."""
    clients = list(litellm.in_memory_llm_clients_cache.cache_dict.values())
    litellm.in_memory_llm_clients_cache.flush_cache()
    for client in clients:
        end = client.close()
        if inspect.isawaitable(end):
            await end


@pytest.fixture
async def litellm(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    """The module, with its prices as installed: it would fetch them from the net when it is imported."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    monkeypatch.setattr(litellm, "telemetry", False)
    monkeypatch.setattr(litellm, "suppress_debug_info", True)
    monkeypatch.setattr(litellm, "disable_aiohttp_transport", True)
    with closing(litellm.HTTPHandler()) as shared:
        monkeypatch.setattr(litellm, "module_level_client", shared)
        yield litellm
        await close_clients(litellm)


@pytest.fixture(params=["openai", "hosted_vllm"])
def complete(request: pytest.FixtureRequest, litellm: Any, server: Running) -> Complete:
    """`complete(**fields)`: a chat completion of this server."""

    def call(**fields: Any) -> Any:
        given = {"model": "demo", "messages": MESSAGES, "api_key": API_KEY, "max_retries": 0} | fields
        model = f"{request.param}/{given.pop('model')}"
        return litellm.completion(model=model, api_base=f"{server.url}/v1", **given)

    return call


def joined(litellm: Any, stream: Any) -> Any:
    return litellm.stream_chunk_builder(list(stream), messages=MESSAGES)


def test_chat(complete: Complete) -> None:
    answer = complete()
    assert answer.choices[0].message.content == "the quick brown fox"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens_details.cached_tokens == 2


def test_fields_reach_the_engine(complete: Complete, server: Running) -> None:
    answer = complete(
        n=2, temperature=0.5, top_p=0.9, seed=3, stop=["dog"], max_tokens=9, presence_penalty=0.1,
        frequency_penalty=0.1, logit_bias={"5": 1}, logprobs=True, top_logprobs=2, user="me",
        extra_body={"top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1},
    )  # fmt: skip
    assert len(answer.choices) == 2
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    sampling = server.engine.requests[0].sampling
    assert (sampling.temperature, sampling.max_tokens, sampling.seed, sampling.top_k) == (0.5, 9, 3, 7)
    assert (sampling.repetition_penalty, sampling.logit_bias) == (1.1, ((5, 1),))


def test_stream(complete: Complete, litellm: Any) -> None:
    chunks = list(complete(stream=True, stream_options={"include_usage": True}))
    assert len(chunks) > 3
    answer = joined(litellm, chunks)
    assert answer.choices[0].message.content == "the quick brown fox"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens_details.cached_tokens == 2


@pytest.mark.parametrize("is_stream", [False, True])
def test_parallel_tools_chosen_by_the_model(complete: Complete, litellm: Any, server: Running, is_stream: bool) -> None:
    server.engine.script = says(server.tokenizer, CALL % "Rome" + "\n" + CALL % "Oslo")
    answer = complete(tools=[TOOL], tool_choice="auto", parallel_tool_calls=True, stream=is_stream)
    message = (joined(litellm, answer) if is_stream else answer).choices[0].message
    assert [json.loads(call.function.arguments)["city"] for call in message.tool_calls] == ["Rome", "Oslo"]
    results = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in message.tool_calls]
    server.engine.script = says(server.tokenizer, "it is sunny")
    assert complete(messages=[*MESSAGES, message, *results]).choices[0].message.content == "it is sunny"


@pytest.mark.parametrize("is_stream", [False, True])
def test_required_and_named_tools(complete: Complete, litellm: Any, server: Running, is_stream: bool) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    for choice, said in (
        ("required", '[{"name": "weather", "parameters": {"city": "Rome"}}]'),
        (named, '{"city": "Rome"}'),
    ):
        server.engine.script = says(server.tokenizer, said)
        answer = complete(tools=[TOOL], tool_choice=choice, stream=is_stream)
        (call,) = (joined(litellm, answer) if is_stream else answer).choices[0].message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Rome"})
    assert all(request.make_constraint is not None for request in server.engine.requests)


def test_json_schema_by_a_pydantic_model(complete: Complete, server: Running) -> None:
    class Animal(BaseModel):
        name: str
        legs: int

    server.engine.script = says(server.tokenizer, '{"name": "fox", "legs": 4}')
    answer = complete(response_format=Animal)
    assert Animal.model_validate_json(answer.choices[0].message.content) == Animal(name="fox", legs=4)
    assert complete(response_format={"type": "json_object"}).choices[0].message.content
    assert all(request.make_constraint is not None for request in server.engine.requests)


def test_errors_become_its_exceptions(complete: Complete, litellm: Any, server: Running) -> None:
    with pytest.raises(litellm.NotFoundError):
        complete(model="gpt-9")
    with pytest.raises(litellm.AuthenticationError):
        complete(api_key="wrong")
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        complete(temperature=3)
    for refusal, expected in (
        (RateLimitError("full", retry_after_seconds=1), litellm.RateLimitError),
        (MemoryExhaustedError("too much"), litellm.ServiceUnavailableError),
        (ContextLengthError("This model's maximum context length is 9 tokens"), litellm.ContextWindowExceededError),
    ):
        server.engine.refusal = refusal
        with pytest.raises(expected):
            complete()
        with pytest.raises(expected):
            list(complete(stream=True))


def test_error_after_the_stream_began_is_raised(litellm: Any, server: Running) -> None:
    """Its `hosted_vllm` does not read such events, whoever sends them."""
    x = 3 + ord("x") - ord("!")
    server.engine.script = lambda request: [Token(0, x), Failure(MemoryExhaustedError("too much"))]
    fields = {"model": "openai/demo", "messages": MESSAGES, "api_base": f"{server.url}/v1", "api_key": API_KEY}
    received = ""
    with pytest.raises(litellm.exceptions.MidStreamFallbackError, match="too much"):
        for chunk in litellm.completion(**fields, stream=True, max_retries=0):
            received += chunk.choices[0].delta.content or ""
    assert received == "x"


def test_text_completion(litellm: Any, server: Running) -> None:
    answer = litellm.text_completion(
        model="text-completion-openai/demo", prompt="hello", api_base=f"{server.url}/v1", api_key=API_KEY, max_tokens=40
    )
    assert answer.choices[0].text == "the quick brown fox"


async def test_async_chat(litellm: Any, server: Running) -> None:
    fields = {"model": "openai/demo", "messages": MESSAGES, "api_base": f"{server.url}/v1", "api_key": API_KEY}
    assert (await litellm.acompletion(**fields)).choices[0].message.content == "the quick brown fox"
    text = ""
    async for chunk in await litellm.acompletion(**fields, stream=True):
        text += chunk.choices[0].delta.content or ""
    assert text == "the quick brown fox"


def test_anthropics_protocol(litellm: Any, server: Running) -> None:
    fields = {"model": "anthropic/demo", "messages": MESSAGES, "api_base": server.url, "api_key": API_KEY}
    answer = litellm.completion(**fields, max_tokens=50)
    assert answer.choices[0].message.content == "the quick brown fox"
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    chunks = list(litellm.completion(**fields, max_tokens=50, stream=True))
    assert joined(litellm, chunks).choices[0].message.content == "the quick brown fox"
