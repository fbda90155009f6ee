"""Parsers of answers: the same parts whatever the borders of the pushed pieces."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.parts.base import CallArguments, CallStart, Content, Part, PartParser, PlainParser, Reasoning
from server.api.parts.forced import NamedParser, RequiredParser
from server.api.parts.hermes import HermesParser
from server.api.parts.llama3 import Llama3Parser
from server.api.parts.reasoning import ReasoningParser

SIZES = [1, 2, 3, 7, 1000]
ARGUMENTS = {"city": 'Zürich {"x"}', "days": [1, 2], "deep": {"a": {"b": "}]</tool_call>"}}}


def run(parser: PartParser, text: str, size: int) -> list[Part]:
    parts = [part for i in range(0, len(text), size) for part in parser.push(text[i : i + size])]
    return parts + parser.flush()


def read(parts: list[Part]) -> tuple[str, str, list[tuple[str, Any]]]:
    """Content, reasoning and calls."""
    content = "".join(part.text for part in parts if isinstance(part, Content))
    reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
    names = [part.name for part in parts if isinstance(part, CallStart)]
    arguments = ["" for _ in names]
    for part in parts:
        if isinstance(part, CallArguments):
            arguments[part.call] += part.text
    return content, reasoning, [(name, json.loads(text)) for name, text in zip(names, arguments, strict=True)]


def call(name: str, key: str = "arguments", arguments: Any = ARGUMENTS) -> str:
    return json.dumps({"name": name, key: arguments}, ensure_ascii=False)


@pytest.mark.parametrize("size", SIZES)
def test_hermes_calls_stand_in_tags(size: int) -> None:
    text = f"Let me see.\n<tool_call>\n{call('f')}\n</tool_call>\n<tool_call>\n{call('g', arguments={})}\n</tool_call>"
    assert read(run(HermesParser(), text, size)) == ("Let me see.\n", "", [("f", ARGUMENTS), ("g", {})])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("text", ["no call <tool", "a < b", "<tool_call>not json</tool_call>", '<tool_call>{"a": 1}'])
def test_hermes_text_without_a_call_is_content(text: str, size: int) -> None:
    content, _, calls = read(run(HermesParser(), text, size))
    assert content.replace("</tool_call>", "") == text.replace("</tool_call>", "")
    assert not calls


@pytest.mark.parametrize("size", SIZES)
def test_hermes_content_may_follow_a_call(size: int) -> None:
    text = f"<tool_call>{call('f')}</tool_call>\ndone"
    content, _, calls = read(run(HermesParser(), text, size))
    assert (content.strip(), [name for name, _ in calls]) == ("done", ["f"])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tag", ["", "<|python_tag|>", "\n\n"])
def test_llama3_answer_that_begins_with_a_call(size: int, tag: str) -> None:
    text = f"{tag}{call('f', 'parameters')}; {call('g', 'parameters', {})}"
    assert read(run(Llama3Parser(), text, size)) == ("", "", [("f", ARGUMENTS), ("g", {})])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("text", ["hello {you}", " <|python", '{"answer": 42} is JSON', '{"unfinished": ', "{", "<x>"])
def test_llama3_other_answers_are_content(text: str, size: int) -> None:
    assert read(run(Llama3Parser(), text, size)) == (text, "", [])


@pytest.mark.parametrize("size", SIZES)
def test_required_calls_are_an_array(size: int) -> None:
    text = f"[{call('f', 'parameters')}, {call('g', 'parameters', {})}]"
    assert read(run(RequiredParser(), text, size)) == ("", "", [("f", ARGUMENTS), ("g", {})])


@pytest.mark.parametrize("size", SIZES)
def test_named_function_gets_the_whole_answer(size: int) -> None:
    assert read(run(NamedParser("f"), json.dumps(ARGUMENTS), size)) == ("", "", [("f", ARGUMENTS)])


@pytest.mark.parametrize("make", [HermesParser, Llama3Parser])
def test_arguments_stream_before_the_call_ends(make: Callable[[], PartParser]) -> None:
    parser = make()
    text = ("<tool_call>" if make is HermesParser else "") + '{"name": "f", "arguments": {"city": "Zür'
    parts = run(parser, text, 5)
    assert CallStart(0, "f") in parts
    assert "".join(part.text for part in parts if isinstance(part, CallArguments)) == '{"city": "Zür'


def test_arguments_may_come_first_or_as_a_string_or_not_at_all() -> None:
    for body, expected in (
        ('{"arguments": {"a": 1}, "name": "f"}', {"a": 1}),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', {"a": 1}),
        ('{"name": "f"}', {}),
        ('{"name": "f", "arguments": null}', {}),
    ):
        assert read(run(HermesParser(), f"<tool_call>{body}</tool_call>", 3))[2] == [("f", expected)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("text", "is_open", "expected"),
    [
        ("<think>\nhm\n</think>\n\nyes", False, ("yes", "hm\n")),
        ("hm</think>yes", True, ("yes", "hm")),
        ("just this", False, ("just this", "")),
        ("<thin", False, ("<thin", "")),
        ("<think>never ends", False, ("", "never ends")),
        ("<think></think>yes", False, ("yes", "")),
        ("see <think>", False, ("see <think>", "")),
    ],
)
def test_reasoning_stands_in_tags_before_the_answer(
    text: str, is_open: bool, expected: tuple[str, str], size: int
) -> None:
    content, reasoning, _ = read(run(ReasoningParser(PlainParser(), is_open=is_open), text, size))
    assert (content, reasoning) == expected


def test_calls_may_follow_reasoning() -> None:
    text = f"<think>hm</think><tool_call>{call('f')}</tool_call>"
    assert read(run(ReasoningParser(HermesParser(), is_open=False), text, 4)) == ("", "hm", [("f", ARGUMENTS)])


@given(st.text(alphabet='<>{}[]"\\:,;ab/tool_call|think ', max_size=80), st.integers(1, 9))
def test_no_text_breaks_a_parser_and_none_depends_on_borders(text: str, size: int) -> None:
    makers: list[Callable[[], PartParser]] = [
        HermesParser,
        Llama3Parser,
        RequiredParser,
        lambda: ReasoningParser(HermesParser(), is_open=False),
    ]
    for make in makers:
        whole, pieces = run(make(), text, 1000), run(make(), text, size)
        for kind in (Content, Reasoning, CallArguments):
            assert text_of(whole, kind).strip() == text_of(pieces, kind).strip()


def text_of(parts: list[Part], kind: type) -> str:
    return "".join(part.text for part in parts if isinstance(part, kind))  # type: ignore[union-attr]
