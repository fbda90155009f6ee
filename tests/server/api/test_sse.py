"""Events rendered from a template are the events that the wire models would write, byte for byte."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.api import sse
from server.api.wire.chat import ChatChunk, ChunkChoice, Delta

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))  # surrogates are not text


def chunk(text: str, model: str = "m") -> ChatChunk:
    choice = ChunkChoice(index=0, delta=Delta(content=text), logprobs=None, finish_reason=None)
    return ChatChunk(id="c", object="chat.completion.chunk", created=1, model=model, choices=[choice], usage=None)


@given(TEXTS)
def test_text_events_are_what_the_model_renders(text: str) -> None:
    assert sse.TextEvents(chunk(sse.TextEvents.MARK)).render(text) == sse.event(chunk(text))


def test_control_characters_and_separators_are_escaped_alike() -> None:
    text = "".join(map(chr, range(0x300))) + "\u2028\u2029\ue000\ufeff\U0001f600"
    assert sse.TextEvents(chunk(sse.TextEvents.MARK)).render(text) == sse.event(chunk(text))


def test_a_model_named_like_the_mark_does_no_harm() -> None:
    marked = chunk(sse.TextEvents.MARK, model=sse.TextEvents.MARK)
    assert sse.TextEvents(marked).render("x") == sse.event(chunk("x", model=sse.TextEvents.MARK))
