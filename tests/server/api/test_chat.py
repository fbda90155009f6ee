"""/v1/chat/completions over a fake engine."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from server.engine.events import Done, Failure, Finish, Token, Usage
from server.engine.tokenizer import Tokenizer
from server.errors import MemoryExhaustedError, RateLimitError
from tests.server.api.sse_reader import read, text_of
from tests.server.conftest import MakeClient
from tests.server.fake_engine import FakeEngine, says

PATH = "/v1/chat/completions"
X = 3 + ord("x") - ord("!")  # after three special tokens the vocabulary begins with ASCII
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}


async def test_answer_in_one_piece(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = (await client.post(PATH, json=HELLO)).json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "demo"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "the quick brown fox", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"] is None
    num_prompt = len(engine.requests[0].prompt_token_ids)
    assert answer["usage"]["prompt_tokens"] == num_prompt
    assert answer["usage"]["total_tokens"] == num_prompt + answer["usage"]["completion_tokens"]


async def test_stream_begins_with_the_role_and_ends_with_the_reason(client: httpx.AsyncClient) -> None:
    events, _ = await read(client, PATH, HELLO)
    assert events[0]["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert text_of(events) == "the quick brown fox"
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    assert events[-2]["choices"][0]["delta"] == {}
    assert events[-1] == "[DONE]"
    assert all("usage" not in event for event in events[:-1])
    assert len({event["id"] for event in events[:-1]}) == 1


async def test_stream_ends_with_the_usage_when_asked_for(
    client: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    engine.script = says(tokenizer, "fox", cached=3)
    events, _ = await read(client, PATH, HELLO | {"stream_options": {"include_usage": True}})
    *chunks, last, done = events
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    assert last["usage"]["retrieval_details"] == {"share_scanned": 0.25}


async def test_every_chunk_tells_the_usage_so_far_when_asked_for(
    client: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    engine.script = says(tokenizer, "the quick fox", "dog")
    options = {"include_usage": True, "continuous_usage_stats": True}
    events, _ = await read(client, PATH, HELLO | {"n": 2, "stream_options": options})
    *chunks, last, _ = events
    num_prompt = len(engine.requests[0].prompt_token_ids)
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {num_prompt}
    counts = [
        [c["usage"]["completion_tokens"] for c in chunks if c["choices"][0]["index"] == choice] for choice in (0, 1)
    ]
    assert all(count == sorted(count) and count[0] == 0 for count in counts)
    assert sum(count[-1] for count in counts) == last["usage"]["completion_tokens"]
    assert len(set(counts[0])) > 2


async def test_echo_puts_the_message_it_goes_on_with_before_the_answer(client: httpx.AsyncClient) -> None:
    messages = [*HELLO["messages"], {"role": "assistant", "content": "I see "}]
    body = {"messages": messages, "echo": True, "add_generation_prompt": False, "continue_final_message": True}
    answer = (await client.post(PATH, json=body)).json()
    assert answer["choices"][0]["message"]["content"] == "I see the quick brown fox"
    events, _ = await read(client, PATH, body)
    assert text_of(events) == "I see the quick brown fox"
    answer = (await client.post(PATH, json=HELLO | {"echo": True})).json()  # the last message is not the assistant's
    assert answer["choices"][0]["message"]["content"] == "the quick brown fox"


async def test_progress_becomes_comments(client: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    engine.script = says(tokenizer, "fox", has_progress=True)
    events, comments = await read(client, PATH, HELLO)
    total = len(engine.requests[0].prompt_token_ids)
    assert comments == [f": prefill {i * total // 2}/{total}" for i in range(3)]
    assert text_of(events) == "fox"


async def test_choices_are_independent(client: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    engine.script = says(tokenizer, "the fox", "a dog")
    answer = (await client.post(PATH, json=HELLO | {"n": 2})).json()
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["the fox", "a dog"]
    events, _ = await read(client, PATH, HELLO | {"n": 2})
    assert (text_of(events, 0), text_of(events, 1)) == ("the fox", "a dog")


@pytest.mark.parametrize("stop", ["k brown", ["zebra", "k b"]])
async def test_stop_string_across_tokens_ends_the_answer_and_the_work(
    client: httpx.AsyncClient, engine: FakeEngine, stop: str | list[str]
) -> None:
    body = HELLO | {"stop": stop}
    answer = (await client.post(PATH, json=body)).json()
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == "the quic"
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] in stop
    assert engine.streams[0].stopped == [0]
    events, _ = await read(client, PATH, body)
    assert text_of(events) == "the quic"
    assert events[-2]["choices"][0]["finish_reason"] == "stop"


async def test_usage_counts_the_tokens_up_to_the_stop_string(client: httpx.AsyncClient) -> None:
    whole = (await client.post(PATH, json=HELLO)).json()["usage"]["completion_tokens"]
    cut = (await client.post(PATH, json=HELLO | {"stop": " quick"})).json()["usage"]["completion_tokens"]
    assert 1 <= cut < whole


async def test_stop_string_may_be_shown(client: httpx.AsyncClient) -> None:
    body = HELLO | {"stop": "quick", "include_stop_str_in_output": True}
    assert (await client.post(PATH, json=body)).json()["choices"][0]["message"]["content"] == "the quick"


async def test_choices_end_at_their_own_stop_strings(
    client: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    engine.script = says(tokenizer, "one stop two", "three four")
    answer = (await client.post(PATH, json=HELLO | {"n": 2, "stop": "stop"})).json()
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["one ", "three four"]
    assert engine.streams[0].stopped == [0]
    assert answer["usage"]["retrieval_details"]["share_scanned"] == 0.25


async def test_text_of_a_stop_token_is_not_shown(
    client: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    (the,) = await tokenizer.encode("the")
    engine.script = lambda request: [
        Token(0, X),
        Token(0, the),
        Finish(0, "stop", the),
        Done(Usage(1, 0, 2, None)),
    ]
    answer = (await client.post(PATH, json=HELLO | {"stop_token_ids": [the]})).json()
    assert answer["choices"][0]["message"]["content"] == tokenizer.decode([X])
    assert answer["choices"][0]["stop_reason"] == the
    assert answer["usage"]["completion_tokens"] == 2


async def test_every_sampling_field_reaches_the_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    fields = {
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "min_tokens": 2,
        "presence_penalty": 0.1,
        "frequency_penalty": -0.1,
        "repetition_penalty": 1.1,
        "seed": 7,
        "ignore_eos": True,
        "stop_token_ids": [5],
    }
    extra = {"logit_bias": {"7": -100}, "max_completion_tokens": 5, "logprobs": True, "top_logprobs": 3}
    names = {"cache_salt": "tenant", "priority": -1, "prompt_cache_key": "session", "user": "somebody"}
    assert (await client.post(PATH, json=HELLO | fields | extra | names)).status_code == 200
    (request,) = engine.requests
    for name, value in fields.items():
        expected = tuple(value) if isinstance(value, list) else value
        assert getattr(request.sampling, name) == expected, name
    assert request.sampling.logit_bias == ((7, -100.0),)
    assert request.sampling.max_tokens == 5
    assert request.sampling.num_logprobs == 3
    assert (request.cache_salt, request.priority, request.session_id) == ("tenant", -1, "session")


async def test_session_may_be_named_by_a_header(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await client.post(PATH, json=HELLO, headers={"X-Session-Id": "from-header"})
    await client.post(PATH, json=HELLO | {"prompt_cache_key": "from-body"}, headers={"X-Session-Id": "from-header"})
    assert [request.session_id for request in engine.requests] == ["from-header", "from-body"]


async def test_checkpoint_sets_the_sampling_defaults(
    make_client: MakeClient, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    tokenizer.generation_config["temperature"] = 0.25
    try:
        client = make_client()
    finally:
        del tokenizer.generation_config["temperature"]
    await client.post(PATH, json=HELLO)
    await client.post(PATH, json=HELLO | {"temperature": 0})
    assert [request.sampling.temperature for request in engine.requests] == [0.25, 0.0]


async def test_content_may_be_a_list_of_text_parts(
    client: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    parts = [{"type": "text", "text": "the fox"}, {"type": "text", "text": "jumps"}]
    await client.post(PATH, json={"messages": [{"role": "user", "content": parts}]})
    assert "user\nthe fox\njumps<|im_end|>" in tokenizer.decode(
        engine.requests[0].prompt_token_ids, skip_special_tokens=False
    )


async def test_developer_message_is_a_system_message_to_templates_that_know_no_other(
    client: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    await client.post(PATH, json={"messages": [{"role": "developer", "content": "be brief"}, *HELLO["messages"]]})
    prompt = tokenizer.decode(engine.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert prompt.startswith("<|im_start|>system\nbe brief")


async def test_last_message_can_be_continued(
    client: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    messages = [*HELLO["messages"], {"role": "assistant", "content": "the qu"}]
    body = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    await client.post(PATH, json=body)
    prompt = tokenizer.decode(engine.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert prompt.endswith("assistant\nthe qu")


async def test_log_probabilities_name_tokens_with_their_bytes(
    client: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    engine.script = says(tokenizer, "é fox", has_logprobs=True)
    body = HELLO | {"logprobs": True, "top_logprobs": 2}
    content = (await client.post(PATH, json=body)).json()["choices"][0]["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "é fox"
    assert all(entry["logprob"] == -0.5 and len(entry["top_logprobs"]) == 2 for entry in content)
    events, _ = await read(client, PATH, body)
    streamed = [
        entry
        for event in events[:-1]
        for choice in event["choices"]
        for entry in (choice["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == content


async def test_refusal_before_any_work_has_its_status(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.refusal = RateLimitError("the queue is full", retry_after_seconds=7)
    for body in (HELLO, HELLO | {"stream": True}):
        response = await client.post(PATH, json=body)
        assert response.status_code == 429
        assert response.headers["retry-after"] == "7"
        assert response.json()["error"]["code"] == "queue_full"


async def test_failure_before_the_first_token_has_its_status(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = lambda request: [Failure(MemoryExhaustedError("too much"))]
    for body in (HELLO, HELLO | {"stream": True}):
        response = await client.post(PATH, json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "kv_memory_exhausted")


async def test_failure_after_the_first_token_is_an_error_event(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = lambda request: [Token(0, X), Failure(MemoryExhaustedError("too much"))]
    events, _ = await read(client, PATH, HELLO)
    assert events[-2]["error"]["code"] == "kv_memory_exhausted"
    assert events[-1] == "[DONE]"


async def test_defect_during_a_stream_ends_it_with_an_error_that_tells_nothing(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.script = lambda request: [Token(0, X), Token(9, X)]
    events, _ = await read(client, PATH, HELLO)
    assert events[-2]["error"]["code"] == "internal_error"
    assert "IndexError" not in events[-2]["error"]["message"]


async def test_request_that_takes_too_long_is_aborted(make_client: MakeClient, engine: FakeEngine) -> None:
    engine.script = lambda request: []
    response = await make_client(request_timeout=0.01).post(PATH, json=HELLO)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "request_timeout")
    assert engine.streams[0].num_aborts


async def test_silent_stream_is_kept_alive(make_client: MakeClient, engine: FakeEngine) -> None:
    engine.script = lambda request: []
    task = asyncio.create_task(read(make_client(sse_keepalive_seconds=0.001), PATH, HELLO))
    await engine.submitted.wait()
    await asyncio.sleep(0.02)
    engine.streams[0].push(Token(0, X), Finish(0, "length"), Done(Usage(1, 0, 1, None)))
    events, comments = await task
    assert ": keep-alive" in comments
    assert events[-1] == "[DONE]"


async def test_stream_that_takes_too_long_ends_with_an_error(make_client: MakeClient, engine: FakeEngine) -> None:
    engine.script = lambda request: [Token(0, X)]
    events, _ = await read(make_client(request_timeout=0.05), PATH, HELLO)
    assert events[-2]["error"]["code"] == "request_timeout"
    assert events[-1] == "[DONE]"
    assert engine.streams[0].num_aborts


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("has_begun", [True, False])
async def test_client_that_goes_away_aborts_its_request(
    make_client: MakeClient, engine: FakeEngine, is_stream: bool, has_begun: bool
) -> None:
    engine.script = lambda request: [Token(0, X)] if has_begun else []
    app = make_client()._transport.app  # type: ignore[attr-defined]
    client = Caller(app, HELLO | {"stream": is_stream})
    call = asyncio.create_task(client.call())
    await engine.submitted.wait()
    if is_stream and has_begun:
        await client.has_answer.wait()
    assert engine.streams[0].num_aborts == 0
    client.leaves.set()
    await call
    assert engine.streams[0].num_aborts >= 1


class Caller:
    """An ASGI client that can hang up."""

    def __init__(self, app: Any, body: dict[str, Any]) -> None:
        self._app = app
        self._request = httpx.Request("POST", f"http://server{PATH}", json=body)
        self._is_sent = False
        self.leaves = asyncio.Event()
        self.has_answer = asyncio.Event()

    async def call(self) -> None:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": PATH,
            "raw_path": PATH.encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": b"",
            "headers": [(name.lower(), value) for name, value in self._request.headers.raw],
            "client": ("test", 1),
            "server": ("server", 80),
        }
        await self._app(scope, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        if not self._is_sent:
            self._is_sent = True
            return {"type": "http.request", "body": self._request.content, "more_body": False}
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message.get("body"):
            self.has_answer.set()
