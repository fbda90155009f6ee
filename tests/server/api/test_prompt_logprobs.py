"""`prompt_logprobs`, `echo` with `logprobs`, and `best_of`, over a fake engine."""

from __future__ import annotations

from itertools import chain
from typing import Any

import httpx
import pytest

from server.api import sampling
from server.engine.events import Done, Event, Finish, Token, TokenLogprob, Usage
from server.engine.request import Request
from server.engine.tokenizer import Tokenizer
from tests.server.api.sse_reader import read, text_of
from tests.server.fake_engine import FakeEngine, says

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}


async def test_prompt_logprobs_have_vllms_shape(
    client: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    chat = (await client.post(CHAT, json=HELLO | {"prompt_logprobs": 2})).json()["prompt_logprobs"]
    completion = (await client.post(COMPLETIONS, json={"prompt": "hello fox", "prompt_logprobs": 2, "n": 2})).json()
    assert completion["choices"][0]["prompt_logprobs"] == completion["choices"][1]["prompt_logprobs"]
    for request, scores in zip(engine.requests, [chat, completion["choices"][0]["prompt_logprobs"]], strict=True):
        ids = request.prompt_token_ids
        assert scores[0] is None
        assert len(scores) == len(ids)
        for token_id, entry in zip(ids[1:], scores[1:], strict=True):
            others = [(token_id + i) % tokenizer.vocab_size for i in (1, 2)]
            assert list(entry) == [str(i) for i in (token_id, *others)]
            text = tokenizer.token_text(token_id)
            assert entry[str(token_id)] == {"logprob": -1.0, "rank": 3, "decoded_token": text}
            assert [entry[str(i)]["rank"] for i in others] == [1, 2]


async def test_prompt_logprobs_are_not_told_unless_asked_for(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert "prompt_logprobs" not in (await client.post(CHAT, json=HELLO)).json()
    body = {"prompt": "hello", "logprobs": 1}
    assert (await client.post(COMPLETIONS, json=body)).json()["choices"][0]["prompt_logprobs"] is None
    assert [request.sampling.num_prompt_logprobs for request in engine.requests] == [None, None]


async def test_prompt_of_one_token_has_no_scores(client: httpx.AsyncClient) -> None:
    body = {"prompt": [5], "prompt_logprobs": 1, "echo": True, "logprobs": 1, "max_tokens": 99}
    (choice,) = (await client.post(COMPLETIONS, json=body)).json()["choices"]
    assert choice["prompt_logprobs"] == [None]


@pytest.mark.parametrize("prompt", ["hello fox", [[5, 6, 7], [8, 9]]])
@pytest.mark.parametrize("num_top", [0, 2])
async def test_echo_with_logprobs_scores_prompt_and_answer_in_one_list(
    client: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer, prompt: Any, num_top: int
) -> None:
    engine.script = says(tokenizer, "the fox", has_logprobs=True)
    body = {"prompt": prompt, "echo": True, "logprobs": num_top, "max_tokens": 99}
    choices = (await client.post(COMPLETIONS, json=body)).json()["choices"]
    for request, choice in zip(engine.requests, choices, strict=True):
        ids, logprobs = request.prompt_token_ids, choice["logprobs"]
        assert "".join(logprobs["tokens"]) == choice["text"]
        assert logprobs["token_logprobs"][: len(ids)] == [None] + [-1.0] * (len(ids) - 1)
        assert set(logprobs["token_logprobs"][len(ids) :]) == {-0.5}
        offsets = [sum(map(len, logprobs["tokens"][:i])) for i in range(len(logprobs["tokens"]))]
        assert logprobs["text_offset"] == offsets
        if not num_top:
            assert logprobs["top_logprobs"] is None
            continue
        assert logprobs["top_logprobs"][0] is None
        own = tokenizer.token_text(ids[1])
        assert logprobs["top_logprobs"][1][own] == -1.0
        assert len(logprobs["top_logprobs"]) == len(logprobs["tokens"])
    events, _ = await read(client, COMPLETIONS, body)
    for index, choice in enumerate(choices):
        parts = [c["logprobs"] for e in events[:-1] for c in e["choices"] if c["index"] == index]
        for name in ("tokens", "token_logprobs", "text_offset"):
            assert [*chain.from_iterable(part[name] for part in parts)] == choice["logprobs"][name]
        assert text_of(events, index) == choice["text"]


async def test_prompt_alone_is_scored_with_no_token_generated(
    client: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    def reads_only(request: Request) -> list[Event]:
        assert request.sampling.max_tokens == 0
        return [*says(tokenizer, "")(request)[:2], Finish(0, "length"), Done(Usage(9, 0, 0, None))]

    engine.script = reads_only
    body = {"prompt": "hello fox", "echo": True, "logprobs": 1, "max_tokens": 0}
    answer = (await client.post(COMPLETIONS, json=body)).json()
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("hello fox", "length")
    assert len(choice["logprobs"]["tokens"]) == len(engine.requests[0].prompt_token_ids)
    assert answer["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"prompt_logprobs": 1}, "prompt_logprobs"), ({"echo": True, "logprobs": 1}, "logprobs")],
)
async def test_too_many_scores_are_refused(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], param: str
) -> None:
    monkeypatch.setattr(sampling, "MAX_PROMPT_SCORES", 20)
    for prompt, status in (([[5] * 6, [5] * 4], 200), ([[5] * 6, [5] * 5], 400)):
        response = await client.post(COMPLETIONS, json=fields | {"prompt": prompt})
        assert response.status_code == status
    assert response.json()["error"]["param"] == param
    assert len(engine.requests) == 2
    messages = [{"role": "user", "content": "hello " * 20}]
    assert (await client.post(CHAT, json={"messages": messages, "prompt_logprobs": 1})).status_code == 400


async def test_best_of_gives_the_likeliest_per_token(
    client: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    (x, y) = [await tokenizer.encode(letter) for letter in "xy"]

    def script(request: Request) -> list[Event]:
        """Choice i says one x more than i, each of a log-probability of its own; a sum would choose another."""
        each = [-3.0, -1.0, -2.0, -4.0]
        said = x if request.prompt_token_ids == (5,) else y
        tokens = [
            Token(i, said[0], TokenLogprob(said[0], each[i])) for i in range(request.sampling.n) for _ in range(i + 1)
        ]
        ends = [Finish(i, "length") for i in range(request.sampling.n)]
        return [*tokens, *ends, Done(Usage(1, 0, len(tokens), None))]

    engine.script = script
    body = {"prompt": [[5], [6]], "best_of": 4, "n": 2}
    answer = (await client.post(COMPLETIONS, json=body)).json()
    assert [choice["text"] for choice in answer["choices"]] == ["xx", "xxx", "yy", "yyy"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 20  # all that were generated
    assert engine.requests[0].sampling.n == 4
