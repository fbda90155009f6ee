"""/v1/completions over a fake engine."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from server.engine.events import Failure
from server.engine.tokenizer import Tokenizer
from server.errors import RateLimitError
from tests.server.api.sse_reader import read, text_of
from tests.server.fake_engine import FakeEngine, says

PATH = "/v1/completions"


async def test_answer_in_one_piece(client: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    answer = (await client.post(PATH, json={"prompt": "hello", "max_tokens": 99})).json()
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["choices"] == [
        {
            "index": 0,
            "text": "the quick brown fox",
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": 0,
            "prompt_logprobs": None,
        }
    ]
    assert engine.requests[0].prompt_token_ids == await tokenizer.encode("hello")


async def test_sixteen_tokens_are_the_default(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await client.post(PATH, json={"prompt": "hello"})
    assert engine.requests[0].sampling.max_tokens == 16


async def test_prompt_may_be_token_ids(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert (await client.post(PATH, json={"prompt": [5, 6, 7]})).status_code == 200
    assert engine.requests[0].prompt_token_ids == (5, 6, 7)


@pytest.mark.parametrize("prompts", [["one", "two"], [[5, 6], [7]]])
async def test_several_prompts_are_answered_in_their_order(
    client: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer, prompts: list[Any]
) -> None:
    engine.script = says(tokenizer, "a fox", "dog")
    body = {"prompt": prompts, "n": 2, "max_tokens": 9}
    answer = (await client.post(PATH, json=body)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in answer["choices"]] == ["a fox", "dog"] * 2
    assert answer["usage"]["prompt_tokens"] == sum(len(request.prompt_token_ids) for request in engine.requests)
    events, _ = await read(client, PATH, body)
    assert [text_of(events, index) for index in range(4)] == ["a fox", "dog"] * 2


async def test_refusal_of_one_prompt_aborts_the_others(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = lambda request: [Failure(RateLimitError("full"))] if request.prompt_token_ids == (6,) else []
    response = await client.post(PATH, json={"prompt": [[5], [6], [7]]})
    assert response.status_code == 429
    assert all(stream.num_aborts for stream in engine.streams)


@pytest.mark.parametrize("prompt", ["the fox", [5, 6]])
async def test_echo_puts_the_prompt_before_the_text(
    client: httpx.AsyncClient, tokenizer: Tokenizer, prompt: str | list[int]
) -> None:
    shown = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
    body = {"prompt": prompt, "echo": True, "max_tokens": 99}
    assert (await client.post(PATH, json=body)).json()["choices"][0]["text"] == shown + "the quick brown fox"
    events, _ = await read(client, PATH, body)
    assert text_of(events) == shown + "the quick brown fox"


async def test_stream_ends_with_the_usage_when_asked_for(client: httpx.AsyncClient) -> None:
    body = {"prompt": "hello", "max_tokens": 99, "stream_options": {"include_usage": True}}
    events, _ = await read(client, PATH, body)
    *chunks, last, done = events
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] > 0


async def test_log_probabilities_are_parallel_lists(
    client: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    engine.script = says(tokenizer, "the fox", has_logprobs=True)
    logprobs = (await client.post(PATH, json={"prompt": "x", "logprobs": 2})).json()["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == "the fox"
    assert logprobs["token_logprobs"] == [-0.5] * len(logprobs["tokens"])
    assert all(len(top) == 2 for top in logprobs["top_logprobs"])
    offsets = [sum(map(len, logprobs["tokens"][:i])) for i in range(len(logprobs["tokens"]))]
    assert logprobs["text_offset"] == offsets


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [5, "a"]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({}, "prompt"),
        ({"prompt": "x", "n": 3, "best_of": 2}, "best_of"),
        ({"prompt": "x", "best_of": 2, "stream": True}, "best_of"),
        ({"prompt": "x", "best_of": 0}, "best_of"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "x", "prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt": "x", "prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt": "x", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
    ],
)
async def test_wrong_field_is_named(client: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    response = await client.post(PATH, json=fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].split("[")[0] == param, error


async def test_neutral_values_of_unsupported_fields_pass(client: httpx.AsyncClient) -> None:
    body = {"prompt": "x", "best_of": 1, "suffix": "", "response_format": {"type": "text"}, "guided_json": None}
    assert (await client.post(PATH, json=body)).status_code == 200
