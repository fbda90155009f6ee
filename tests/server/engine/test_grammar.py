"""Grammars: whatever a sampler draws from the allowed tokens, finished texts match."""

from __future__ import annotations

import asyncio
import json
import random
import re
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.engine.constraint import LogitsConstraint
from server.engine.events import Finish, Token
from server.engine.grammar import GrammarCompiler, GrammarSpec
from server.engine.request import Request, SamplingParams
from server.engine.tokenizer import Tokenizer
from server.errors import InvalidRequestError
from tests.schemas import SCHEMAS, format_checker


def draw(constraint: LogitsConstraint, tokenizer: Tokenizer, rng: random.Random, most: int = 2000) -> str:
    """A text of random allowed tokens, up to eos."""
    token_ids: list[int] = []
    for _ in range(most):
        allowed = constraint.allowed_tokens(tokenizer.vocab_size).nonzero()[0].tolist()
        assert allowed
        token_id = rng.choice(allowed)
        constraint.accept(token_id)
        if token_id in tokenizer.eos_token_ids:
            return tokenizer.decode(token_ids)
        token_ids.append(token_id)
    pytest.fail(f"not finished: {tokenizer.decode(token_ids)}")


@pytest.fixture(scope="session")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer)


def make(compiler: GrammarCompiler, kind: Any, source: Any) -> LogitsConstraint:
    return asyncio.run(compiler.compile(GrammarSpec(kind, source, "response_format")))()


@given(SCHEMAS, st.integers(0, 2**32))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_finished_json_validates_against_its_schema(
    compiler: GrammarCompiler, tokenizer: Tokenizer, schema: dict[str, Any], seed: int
) -> None:
    text = draw(make(compiler, "json_schema", schema), tokenizer, random.Random(seed))
    jsonschema.validate(json.loads(text), schema, format_checker=format_checker())


def test_choice_is_one_of_the_texts(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    choices = ["yes", "no", 'it\'s "maybe"\n', "日本"]
    drawn = {draw(make(compiler, "choice", choices), tokenizer, random.Random(seed)) for seed in range(40)}
    assert drawn <= set(choices)
    assert len(drawn) > 1


def test_text_matches_the_pattern(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    pattern = r"[A-F0-9]{4}-(left|right)"
    assert re.fullmatch(pattern, draw(make(compiler, "regex", pattern), tokenizer, random.Random(0)))


def test_grammars_may_be_lark_or_gbnf(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    for grammar in ('start: "a" "b"', 'root ::= "a" "b"'):
        assert draw(make(compiler, "grammar", grammar), tokenizer, random.Random(0)) == "ab"


def test_sequences_of_one_grammar_do_not_share_their_state(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    maker = asyncio.run(compiler.compile(GrammarSpec("choice", ["ab", "cd"], "x")))
    first, second = maker(), maker()
    (a,) = asyncio.run(tokenizer.encode("a"))
    first.accept(a)
    (c,) = asyncio.run(tokenizer.encode("c"))
    assert not first.allowed_tokens(tokenizer.vocab_size)[c]
    assert second.allowed_tokens(tokenizer.vocab_size)[c]


def test_only_eos_is_allowed_after_the_end_and_logits_may_outnumber_tokens(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    constraint = make(compiler, "choice", ["a"])
    (a,) = asyncio.run(tokenizer.encode("a"))
    constraint.accept(a)
    allowed = constraint.allowed_tokens(tokenizer.vocab_size + 100)
    assert set(allowed.nonzero()[0].tolist()) == set(tokenizer.eos_token_ids)
    constraint.accept(*tokenizer.eos_token_ids)
    assert set(constraint.allowed_tokens(tokenizer.vocab_size).nonzero()[0].tolist()) == set(tokenizer.eos_token_ids)


def test_token_that_is_not_allowed_is_an_error(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    (z,) = asyncio.run(tokenizer.encode("z"))
    with pytest.raises(ValueError, match="cannot be followed"):
        make(compiler, "choice", ["a"]).accept(z)


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("json_schema", {"type": "array", "uniqueItems": True}),
        ("json_schema", {"$ref": "#/$defs/nothing"}),
        ("json_schema", {"type": "colour"}),
        ("regex", "("),
        ("grammar", "start: nothing"),
        ("grammar", "::="),
    ],
)
def test_what_cannot_be_followed_is_the_callers_error(compiler: GrammarCompiler, kind: Any, source: Any) -> None:
    with pytest.raises(InvalidRequestError) as error:
        make(compiler, kind, source)
    assert error.value.param == "response_format"


@pytest.mark.parametrize("sampling", [{"min_tokens": 30}, {"ignore_eos": True}, {"min_tokens": 30, "ignore_eos": True}])
async def test_answer_ends_with_its_grammar_whatever_else_is_asked(
    sampling: dict[str, Any], compiler: GrammarCompiler, make_engine: Any, tokenizer: Tokenizer
) -> None:
    make_constraint = await compiler.compile(GrammarSpec("choice", ["yes", "no"], "x"))
    engine = make_engine()
    engine._runner.end_ids = tokenizer.eos_token_ids
    params = SamplingParams(max_tokens=40, **sampling)
    events = [e async for e in engine.submit(Request("r", (5, 6, 7), params, make_constraint=make_constraint))]
    assert [e.reason for e in events if isinstance(e, Finish)] == ["stop"]
    token_ids = [e.token_id for e in events if isinstance(e, Token)]
    assert tokenizer.decode(token_ids) in ("yes", "no")


async def test_min_tokens_keeps_an_answer_going_that_its_grammar_lets_go_on(
    compiler: GrammarCompiler, make_engine: Any, tokenizer: Tokenizer
) -> None:
    make_constraint = await compiler.compile(GrammarSpec("regex", "a*", "x"))
    engine = make_engine()
    engine._runner.end_ids = tokenizer.eos_token_ids
    (eos,) = tokenizer.eos_token_ids
    params = SamplingParams(max_tokens=40, min_tokens=7, logit_bias=((eos, 100.0),))
    events = [e async for e in engine.submit(Request("r", (5, 6, 7), params, make_constraint=make_constraint))]
    token_ids = [e.token_id for e in events if isinstance(e, Token)]
    assert len(token_ids) == 8
    assert set(tokenizer.decode(token_ids)) == {"a"}
