"""Anthropic's own SDK against a running server."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import pytest
from anthropic import Anthropic

from server.engine.events import Failure, Token
from server.errors import MemoryExhaustedError, RateLimitError
from tests.conformance.conftest import API_KEY, Running
from tests.server.fake_engine import says

MESSAGES = [{"role": "user", "content": "hello"}]
TOOL = {"name": "weather", "description": "of a city", "input_schema": {"type": "object"}}
CALLING = 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


@pytest.fixture
def messages_client(server: Running) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url, api_key=API_KEY, max_retries=0) as client:
        yield client


def test_message(messages_client: Anthropic, server: Running) -> None:
    answer = messages_client.messages.create(model="demo", max_tokens=50, messages=MESSAGES, system="be brief")
    assert answer.content[0].text == "the quick brown fox"
    assert answer.stop_reason == "end_turn"
    assert answer.usage.cache_read_input_tokens == 2
    prompt = server.tokenizer.decode(server.engine.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert prompt.startswith("<|im_start|>system\nbe brief")


def test_stream(messages_client: Anthropic) -> None:
    with messages_client.messages.stream(model="demo", max_tokens=50, messages=MESSAGES) as stream:
        assert "".join(stream.text_stream) == "the quick brown fox"
        final = stream.get_final_message()
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens > 0


def test_stop_sequence(messages_client: Anthropic) -> None:
    answer = messages_client.messages.create(model="demo", max_tokens=50, messages=MESSAGES, stop_sequences=[" brown"])
    assert (answer.content[0].text, answer.stop_reason, answer.stop_sequence) == (
        "the quick",
        "stop_sequence",
        " brown",
    )


def test_length(messages_client: Anthropic) -> None:
    assert messages_client.messages.create(model="demo", max_tokens=1, messages=MESSAGES).stop_reason == "max_tokens"


def test_tools(messages_client: Anthropic, server: Running) -> None:
    server.engine.script = says(server.tokenizer, CALLING)
    answer = messages_client.messages.create(model="demo", max_tokens=200, messages=MESSAGES, tools=[TOOL])
    text, call = answer.content
    assert text.text.strip() == "I look."
    assert (call.type, call.name, call.input) == ("tool_use", "weather", {"city": "Rome"})
    assert answer.stop_reason == "tool_use"
    with messages_client.messages.stream(model="demo", max_tokens=200, messages=MESSAGES, tools=[TOOL]) as stream:
        final = stream.get_final_message()
    assert final.content[1].input == {"city": "Rome"}
    assert final.stop_reason == "tool_use"
    history = [
        *MESSAGES,
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}]},
    ]
    server.engine.script = says(server.tokenizer, "it is sunny")
    answer = messages_client.messages.create(model="demo", max_tokens=50, messages=history, tools=[TOOL])
    assert answer.content[0].text == "it is sunny"


def test_count_tokens(messages_client: Anthropic, server: Running) -> None:
    count = messages_client.messages.count_tokens(model="demo", messages=MESSAGES).input_tokens
    messages_client.messages.create(model="demo", max_tokens=5, messages=MESSAGES)
    assert count == len(server.engine.requests[0].prompt_token_ids)


def test_errors_become_the_sdks_exceptions(messages_client: Anthropic, server: Running) -> None:
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        messages_client.messages.create(model="demo", max_tokens=5, messages=MESSAGES, extra_body={"temperature": 3})
    with pytest.raises(anthropic.NotFoundError):
        messages_client.messages.create(model="gpt-9", max_tokens=5, messages=MESSAGES)
    with pytest.raises(anthropic.AuthenticationError):
        messages_client.with_options(api_key="wrong").messages.create(model="demo", max_tokens=5, messages=MESSAGES)
    server.engine.refusal = RateLimitError("full", retry_after_seconds=1)
    with pytest.raises(anthropic.RateLimitError):
        messages_client.messages.create(model="demo", max_tokens=5, messages=MESSAGES)


def test_error_after_the_stream_began_is_raised(messages_client: Anthropic, server: Running) -> None:
    x = 3 + ord("x") - ord("!")
    server.engine.script = lambda request: [Token(0, x), Failure(MemoryExhaustedError("too much"))]
    with (
        pytest.raises(anthropic.APIStatusError, match="too much"),
        messages_client.messages.stream(model="demo", max_tokens=5, messages=MESSAGES) as stream,
    ):
        stream.until_done()
