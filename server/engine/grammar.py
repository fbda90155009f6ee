"""Grammars over tokens: JSON schemas, regular expressions, choices and context-free grammars, through llguidance.

The only place that knows llguidance. Compiling runs on the event loop's thread pool and drops the GIL; the compiled
grammar is copied for each sequence and then belongs to the engine thread.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import llguidance
import numpy as np
from numpy.typing import NDArray

from server.engine.constraint import LogitsConstraint
from server.engine.tokenizer import Tokenizer
from server.errors import InvalidRequestError

Kind = Literal["json_schema", "regex", "choice", "grammar"]

# One way to write a value: a small model would otherwise be free to write spaces for ever.
_JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """What an answer has to look like. `source`: a schema, a pattern, a list of texts, Lark or GBNF."""

    kind: Kind
    source: Any
    param: str  # the field it came from, for errors


class GrammarCompiler:
    """Compiles grammars for one tokenizer, whose vocabulary is read on first use (about a second for 128K tokens)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._lock = threading.Lock()

    async def compile(self, spec: GrammarSpec) -> Callable[[], LogitsConstraint]:
        """A maker of constraints, one per sequence. Raises InvalidRequestError naming what is not supported."""
        matcher = await asyncio.to_thread(self._compile, spec)
        eos_token_ids = self._tokenizer.eos_token_ids
        return lambda: GrammarConstraint(matcher.deep_copy(), eos_token_ids)

    def _compile(self, spec: GrammarSpec) -> llguidance.LLMatcher:
        try:
            grammar = _grammar(spec)
        except ValueError as error:
            raise InvalidRequestError(f"'{spec.param}': {error}", param=spec.param) from error
        matcher = llguidance.LLMatcher(self._read_vocabulary(), grammar, log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().split("\n")[0]
            raise InvalidRequestError(f"'{spec.param}' cannot be followed: {reason}", param=spec.param)
        return matcher

    def _read_vocabulary(self) -> llguidance.LLTokenizer:
        with self._lock:
            if self._vocabulary is None:
                serialized = self._tokenizer.serialized()
                eos = sorted(self._tokenizer.eos_token_ids)
                if serialized is None or not eos:
                    raise InvalidRequestError("this model's tokenizer does not support structured outputs")
                self._vocabulary = llguidance.LLTokenizer(serialized, eos_token=eos)
            return self._vocabulary


class GrammarConstraint:
    """Where one sequence stands in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, eos_token_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._eos_token_ids = sorted(eos_token_ids)

    def allowed_tokens(self, vocab_size: int) -> NDArray[np.bool_]:
        allowed = np.zeros(vocab_size, dtype=np.bool_)
        if self._matcher.is_stopped():
            self._check()
            allowed[self._eos_token_ids] = True
            return allowed
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        flags = np.unpackbits(bits, bitorder="little")[:vocab_size]
        allowed[: len(flags)] = flags
        return allowed

    def accept(self, token_id: int) -> None:
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"the grammar cannot be followed: {self._matcher.get_error()}")


def _grammar(spec: GrammarSpec) -> str:
    """Raises ValueError for what is not even well-formed."""
    if spec.kind == "json_schema":
        return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(spec.source), overrides=_JSON_STYLE)
    if spec.kind == "choice":
        return llguidance.grammar_from("choice", json.dumps(spec.source))
    return llguidance.grammar_from(spec.kind, spec.source)
