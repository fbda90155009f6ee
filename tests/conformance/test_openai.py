"""OpenAI's own SDK against a running server: what it sends is understood, what it gets it understands."""

from __future__ import annotations

import time

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from server.engine.events import Failure, Token
from server.errors import ContextLengthError, MemoryExhaustedError, RateLimitError
from tests.conformance.conftest import Running
from tests.server.fake_engine import says

MESSAGES = [{"role": "user", "content": "hello"}]


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=MESSAGES)
    assert answer.choices[0].message.content == "the quick brown fox"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 2


def test_chat_stream(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="demo", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == "the quick brown fox"
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + chunks[-1].usage.completion_tokens


def test_chat_stream_helper(client: OpenAI) -> None:
    with client.chat.completions.stream(model="demo", messages=MESSAGES) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == "the quick brown fox"


def test_every_field_the_sdk_has_and_vllms_beside_them(client: OpenAI, server: Running) -> None:
    answer = client.chat.completions.create(
        model="demo",
        messages=[{"role": "developer", "content": "be brief"}, *MESSAGES],
        n=2,
        stop=["dog"],
        seed=1,
        temperature=0.5,
        top_p=0.9,
        max_completion_tokens=40,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        logit_bias={"5": 1},
        logprobs=True,
        top_logprobs=2,
        user="somebody",
        prompt_cache_key="chat-1",
        extra_body={"top_k": 5, "min_p": 0.1, "min_tokens": 1, "repetition_penalty": 1.1, "ignore_eos": True},
    )
    assert len(answer.choices) == 2
    logprobs = answer.choices[1].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content[0].top_logprobs) == 2
    assert server.engine.requests[0].session_id == "chat-1"
    assert server.engine.requests[0].sampling.top_k == 5


def test_text_completion(client: OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt=["a", "b"], max_tokens=30, echo=True)
    assert [choice.text for choice in answer.choices] == ["athe quick brown fox", "bthe quick brown fox"]


def test_text_completion_of_token_ids_with_logprobs(client: OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt=[5, 6], max_tokens=30, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == "the quick brown fox"


def test_text_completion_stream(client: OpenAI) -> None:
    stream = client.completions.create(model="demo", prompt="a", max_tokens=30, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "the quick brown fox"


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"


def test_request_id_reaches_the_sdk(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=MESSAGES, extra_headers={"X-Request-Id": "mine"})
    assert answer._request_id == "mine"


def test_errors_become_the_sdks_exceptions(client: OpenAI, server: Running) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="demo", messages=MESSAGES, temperature=3)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        (ContextLengthError("too long"), openai.BadRequestError),
        (RateLimitError("full", retry_after_seconds=1), openai.RateLimitError),
        (MemoryExhaustedError("too much"), openai.InternalServerError),
    ],
)
def test_refusals_become_the_sdks_exceptions(
    client: OpenAI, server: Running, refusal: Exception, expected: type[openai.APIStatusError]
) -> None:
    server.engine.refusal = refusal  # type: ignore[assignment]
    for is_stream in (False, True):
        with pytest.raises(expected) as error:
            client.chat.completions.create(model="demo", messages=MESSAGES, stream=is_stream)
        assert error.value.code == refusal.code  # type: ignore[attr-defined]


def test_sdk_retries_when_the_queue_is_full(client: OpenAI, server: Running) -> None:
    attempts = 0
    answer = says(server.tokenizer, "fox")

    def script(request):  # type: ignore[no-untyped-def]
        nonlocal attempts
        attempts += 1
        return [Failure(RateLimitError("full", retry_after_seconds=0))] if attempts == 1 else answer(request)

    server.engine.script = script
    retrying = client.with_options(max_retries=1)
    assert retrying.chat.completions.create(model="demo", messages=MESSAGES).choices[0].message.content == "fox"
    assert attempts == 2


def test_error_after_the_stream_began_is_raised(client: OpenAI, server: Running) -> None:
    x = 3 + ord("x") - ord("!")
    server.engine.script = lambda request: [Token(0, x), Failure(MemoryExhaustedError("too much"))]
    received = ""
    with pytest.raises(openai.APIError, match="too much"):
        for chunk in client.chat.completions.create(model="demo", messages=MESSAGES, stream=True):
            received += chunk.choices[0].delta.content or ""
    assert received == "x"


def test_closing_the_stream_aborts_the_request(client: OpenAI, server: Running) -> None:
    x = 3 + ord("x") - ord("!")
    server.engine.script = lambda request: [Token(0, x)]
    stream = client.chat.completions.create(model="demo", messages=MESSAGES, stream=True)
    next(iter(stream))
    stream.close()
    for _ in range(500):  # the server learns of it in its own time
        if server.engine.streams[0].num_aborts:
            return
        time.sleep(0.01)
    pytest.fail("the request was not aborted")


def test_tools(client: OpenAI, server: Running) -> None:
    server.engine.script = says(
        server.tokenizer, '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    )
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    answer = client.chat.completions.create(model="demo", messages=MESSAGES, tools=[tool])
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.tool_calls is not None
    assert answer.choices[0].message.tool_calls[0].function.arguments == '{"city": "Rome"}'
    with client.chat.completions.stream(model="demo", messages=MESSAGES, tools=[tool]) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls is not None
    assert message.tool_calls[0].function.arguments == '{"city": "Rome"}'
    turn = [*MESSAGES, message.model_dump(exclude_none=True, exclude={"parsed"})]
    call_id = message.tool_calls[0].id
    history = [*turn, {"role": "tool", "tool_call_id": call_id, "content": "sunny"}]
    server.engine.script = says(server.tokenizer, "the quick fox")
    for turn_message in history:
        for call in turn_message.get("tool_calls", []):
            call.pop("index", None)
            call["function"].pop("parsed_arguments", None)
    assert client.chat.completions.create(model="demo", messages=history).choices[0].message.content


def test_json_schema_by_a_pydantic_model(client: OpenAI, server: Running) -> None:
    class Animal(BaseModel):
        name: str
        legs: int

    server.engine.script = says(server.tokenizer, '{"name": "fox", "legs": 4}')
    answer = client.chat.completions.parse(model="demo", messages=MESSAGES, response_format=Animal)
    assert answer.choices[0].message.parsed == Animal(name="fox", legs=4)
    assert server.engine.requests[0].make_constraint is not None


def test_responses(client: OpenAI, server: Running) -> None:
    answer = client.responses.create(model="demo", input="hello", instructions="be brief", max_output_tokens=40)
    assert answer.output_text == "the quick brown fox"
    assert answer.status == "completed"
    assert answer.usage is not None
    assert answer.usage.input_tokens_details.cached_tokens == 2
    prompt = server.tokenizer.decode(server.engine.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert prompt.startswith("<|im_start|>system\nbe brief")
    second = client.responses.create(model="demo", input=[*answer.output, {"role": "user", "content": "more"}])
    assert second.output_text


def test_responses_stream(client: OpenAI) -> None:
    with client.responses.stream(model="demo", input=[{"role": "user", "content": "hello"}]) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert "response.output_text.delta" in kinds
    assert final.output_text == "the quick brown fox"


def test_responses_with_tools(client: OpenAI, server: Running) -> None:
    server.engine.script = says(
        server.tokenizer, '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    )
    tool = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}
    answer = client.responses.create(model="demo", input="hello", tools=[tool])
    (call,) = answer.output
    assert (call.type, call.name, call.arguments) == ("function_call", "weather", '{"city": "Rome"}')
    with client.responses.stream(model="demo", input="hello", tools=[tool]) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output[0].arguments == '{"city": "Rome"}'
    assert "response.function_call_arguments.delta" in kinds
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    server.engine.script = says(server.tokenizer, "it is sunny")
    final = client.responses.create(model="demo", input=[{"role": "user", "content": "hello"}, call, result])
    assert final.output_text == "it is sunny"


def test_responses_by_a_pydantic_model(client: OpenAI, server: Running) -> None:
    class Animal(BaseModel):
        name: str
        legs: int

    server.engine.script = says(server.tokenizer, '{"name": "fox", "legs": 4}')
    answer = client.responses.parse(model="demo", input="hello", text_format=Animal)
    assert answer.output_parsed == Animal(name="fox", legs=4)


def test_responses_refuse_what_is_stored(client: OpenAI) -> None:
    for fields in ({"store": True}, {"previous_response_id": "resp_1"}, {"background": True}):
        with pytest.raises(openai.BadRequestError) as error:
            client.responses.create(model="demo", input="hello", **fields)
        assert error.value.param in fields


def test_responses_error_after_the_stream_began_is_an_event(client: OpenAI, server: Running) -> None:
    x = 3 + ord("x") - ord("!")
    server.engine.script = lambda request: [Token(0, x), Failure(MemoryExhaustedError("too much"))]
    with client.responses.create(model="demo", input="hello", stream=True) as stream:
        events = list(stream)
    assert events[-1].type == "error"
    assert events[-1].code == "kv_memory_exhausted"
