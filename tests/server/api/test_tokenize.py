"""/tokenize and /detokenize in vLLM's shapes."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from server.engine.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "fox"}]


async def test_prompt_is_encoded(client: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    answer = (await client.post("/tokenize", json={"prompt": "the quick fox"})).json()
    ids = list(await tokenizer.encode("the quick fox"))
    assert answer == {"count": len(ids), "max_model_len": 4096, "tokens": ids, "token_strs": None}


async def test_messages_are_encoded_as_the_chat_endpoint_reads_them(
    client: httpx.AsyncClient, tokenizer: Tokenizer
) -> None:
    answer = (await client.post("/tokenize", json={"messages": MESSAGES})).json()
    assert answer["tokens"] == list(await tokenizer.encode_chat(MESSAGES))
    bare = (await client.post("/tokenize", json={"messages": MESSAGES, "add_generation_prompt": False})).json()
    assert bare["count"] < answer["count"]


async def test_tokens_are_named_when_asked_for(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/tokenize", json={"prompt": "the fox", "return_token_strs": True})).json()
    assert "".join(answer["token_strs"]) == "theĠfox"


async def test_detokenize_reverses_tokenize(client: httpx.AsyncClient) -> None:
    text = "the fox <|im_end|> 😀"
    tokens = (await client.post("/tokenize", json={"prompt": text})).json()["tokens"]
    assert (await client.post("/detokenize", json={"tokens": tokens})).json() == {"prompt": text}


async def test_empty_prompt_has_no_tokens(client: httpx.AsyncClient) -> None:
    assert (await client.post("/tokenize", json={"prompt": ""})).json()["count"] == 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "x", "messages": MESSAGES}),
        ("/tokenize", {"messages": []}),
        ("/detokenize", {"tokens": [99999]}),
        ("/detokenize", {"tokens": "x"}),
        ("/detokenize", {}),
    ],
)
async def test_wrong_body_is_a_bad_request(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
    response = await client.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
