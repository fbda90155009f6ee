"""Tokenizer: encoding, templates, token bytes; Detokenizer: the same text as decoding at once, in whole characters."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.tokenizer import REPLACEMENT, Detokenizer, Tokenizer
from server.errors import InvalidRequestError

TEXTS = [
    "the quick brown fox",
    "héllo wörld",
    "😀😀 emoji 👩‍👩‍👧‍👦 family",
    "日本語のテキスト",
    "a\u0301 \U0001f1e9\U0001f1ea",
    "",
]


def stream(tokenizer: Tokenizer, ids: tuple[int, ...], prompt: tuple[int, ...] = ()) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
async def test_streamed_text_equals_the_text(tokenizer: Tokenizer, text: str) -> None:
    pieces = stream(tokenizer, await tokenizer.encode(text))
    assert "".join(pieces) == text
    assert not any(REPLACEMENT in piece for piece in pieces)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters=REPLACEMENT), max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_streams_in_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    ids = asyncio.run(tokenizer.encode(text))
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == text
    assert not any(REPLACEMENT in piece for piece in pieces)


@given(st.lists(st.integers(0, 319), max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_tokens_stream_to_what_they_decode_to(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert "".join(stream(tokenizer, tuple(ids))) == tokenizer.decode(ids)


@pytest.mark.parametrize("text", ["😀日本 é", "日" * 40])
def test_bytes_of_sentencepiece_stream_in_whole_characters(byte_fallback: Tokenizer, text: str) -> None:
    ids = tuple(byte + 2 for byte in text.encode())
    pieces = stream(byte_fallback, ids)
    assert "".join(pieces) == text
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_first_word_after_a_prompt_keeps_its_space(byte_fallback: Tokenizer) -> None:
    world = 258 + 2
    assert byte_fallback.decode([world]) == "world"
    assert stream(byte_fallback, (world,), prompt=(259,)) == [" world", ""]


def test_prompt_cut_inside_a_character_does_not_leak_it(byte_fallback: Tokenizer) -> None:
    prompt = tuple(byte + 2 for byte in "日本語".encode())
    ids = tuple(byte + 2 for byte in "本".encode())
    assert "".join(stream(byte_fallback, ids, prompt)) == "本"


def test_endless_invalid_bytes_are_shown_and_the_window_stays_small(tokenizer: Tokenizer) -> None:
    continuation = next(i for i in range(320) if tokenizer.token_bytes(i) == b"\x80")
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.push(continuation) for _ in range(500))
    assert text.count(REPLACEMENT) >= 490
    assert len(detokenizer._window) <= 2 * Detokenizer.MAX_PENDING
    assert text + detokenizer.flush() == REPLACEMENT * 500


def test_special_tokens_are_skipped_unless_asked_for(tokenizer: Tokenizer) -> None:
    (end,) = tokenizer.eos_token_ids
    assert Detokenizer(tokenizer).push(end) == ""
    assert Detokenizer(tokenizer, skip_special_tokens=False).push(end) == "<|im_end|>"


@pytest.mark.parametrize("text", TEXTS)
async def test_token_bytes_join_to_the_text(tokenizer: Tokenizer, byte_fallback: Tokenizer, text: str) -> None:
    assert b"".join(map(tokenizer.token_bytes, await tokenizer.encode(text))).decode() == text
    assert b"".join(byte_fallback.token_bytes(byte + 2) for byte in text.encode()).decode() == text


def test_id_without_a_token_has_no_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(10**6) == b""


async def test_long_text_is_encoded_on_a_thread_with_the_same_result(tokenizer: Tokenizer) -> None:
    text = "the quick brown fox " * 100
    assert tokenizer.decode(await tokenizer.encode(text)) == text


async def test_a_megabyte_is_encoded_while_the_event_loop_turns(tokenizer: Tokenizer) -> None:
    encoding = asyncio.create_task(tokenizer.encode("the quick brown fox " * 50_000))
    num_turns = 0
    while not encoding.done():
        num_turns += 1
        await asyncio.sleep(0)
    assert len(encoding.result()) > 100_000
    assert num_turns > 100, "the encoder holds the interpreter's lock"


async def test_chat_ends_with_the_generation_prompt(tokenizer: Tokenizer) -> None:
    ids = await tokenizer.encode_chat([{"role": "user", "content": "fox"}])
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text == "<|im_start|>user\nfox<|im_end|>\n<|im_start|>assistant\n"


async def test_chat_can_continue_its_last_message(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "the qu"}]
    ids = await tokenizer.encode_chat(messages, add_generation_prompt=False, continue_final_message=True)
    assert tokenizer.decode(ids, skip_special_tokens=False).endswith("assistant\nthe qu")


async def test_template_that_refuses_is_the_callers_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="unknown role judge"):
        await tokenizer.encode_chat([{"role": "judge", "content": ""}])


async def test_model_without_a_template_says_how_to_give_one(byte_fallback: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="--chat-template"):
        await byte_fallback.encode_chat([{"role": "user", "content": ""}])
