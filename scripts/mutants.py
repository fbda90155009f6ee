"""Calls of every endpoint with one to three things in them changed: for tests and scripts that try to break a server.

Pure; all randomness comes from the generator that is handed in.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}}, "required": ["a"]}
FUNCTION = {"name": "f", "description": "of a", "parameters": SCHEMA}
JSON = "application/json"
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}]
CONVERSATION = [
    {"role": "developer", "content": "be brief"},
    {"role": "user", "content": "hello", "name": "me"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "1", "tool_call_id": "1"},
]
SAMPLING: dict[str, Any] = {
    "temperature": 0.9,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.05,
    "seed": 1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": 2},
    "stop": ["a", "zebra"],
    "stop_token_ids": [7],
    "min_tokens": 2,
    "ignore_eos": False,
    "max_tokens": 6,
}
BLOCKS = [
    {"type": "text", "text": "x"},
    {"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}},
]
BODIES: list[tuple[str, dict[str, Any]]] = [
    (
        "/v1/chat/completions",
        {
            "messages": MESSAGES,
            "tools": [{"type": "function", "function": FUNCTION}],
            "stop": ["a"],
            "logit_bias": {"1": 1},
            "stream": True,
            "max_tokens": 8,
        },
    ),
    ("/v1/chat/completions", {"messages": CONVERSATION, "n": 2, "logprobs": True, "top_logprobs": 2, **SAMPLING}),
    (
        "/v1/chat/completions",
        {
            "messages": MESSAGES,
            "max_completion_tokens": 8,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}},
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": MESSAGES,
            "max_tokens": 8,
            "tools": [{"type": "function", "function": FUNCTION}],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            "parallel_tool_calls": False,
            "prompt_cache_key": "chat",
            "chat_template_kwargs": {"x": [1]},
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": MESSAGES,
            "max_tokens": 4,
            "echo": True,
            "add_generation_prompt": False,
            "continue_final_message": True,
            "prompt_logprobs": 1,
        },
    ),
    ("/v1/completions", {"prompt": [[5, 6], [7]], "n": 2, "logprobs": 1, "max_tokens": 5}),
    (
        "/v1/completions",
        {"prompt": "hello", "echo": True, "logprobs": 2, "best_of": 2, "prompt_logprobs": 1} | SAMPLING,
    ),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 8, "stream": True, "guided_regex": "[a-c]{2,5}"}),
    ("/v1/completions", {"prompt": "x", "max_tokens": 8, "structured_outputs": {"choice": ["yes", "no"]}}),
    ("/v1/completions", {"prompt": "x", "max_tokens": 8, "guided_grammar": 'root ::= "a" | "b" root'}),
    ("/v1/completions", {"prompt": "x", "max_tokens": 8, "guided_json": SCHEMA, "cache_salt": "s", "priority": 1}),
    (
        "/v1/responses",
        {
            "input": [{"role": "user", "content": "x"}],
            "max_output_tokens": 8,
            "text": {"format": {"type": "json_object"}},
        },
    ),
    (
        "/v1/responses",
        {
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
                {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "1", "output": "1"},
            ],
            "instructions": "be brief",
            "tools": [{"type": "function", **FUNCTION, "strict": False}],
            "max_output_tokens": 8,
            "stream": True,
        },
    ),
    (
        "/v1/messages",
        {
            "messages": MESSAGES,
            "max_tokens": 5,
            "system": "x",
            "tool_choice": {"type": "auto"},
            "stop_sequences": ["a"],
        },
    ),
    (
        "/v1/messages",
        {
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": BLOCKS},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "1"}]},
            ],
            "tools": [{"name": "f", "input_schema": SCHEMA}],
            "max_tokens": 5,
            "stream": True,
        },
    ),
    ("/v1/messages/count_tokens", {"messages": MESSAGES}),
    ("/tokenize", {"prompt": "x", "add_special_tokens": True}),
    ("/tokenize", {"messages": MESSAGES, "return_token_strs": True}),
    ("/detokenize", {"tokens": [5, 6]}),
    ("/v1/sessions", {"id": "a", "prompt": "hello there"}),
    ("/v1/sessions", {"id": "a", "messages": MESSAGES, "stream": True}),
    ("/v1/sessions/a/pin", {"ttl_seconds": 5}),
    ("/v1/sessions/a/fork", {"id": "b"}),
]
BARE = [
    ("GET", "/v1/models/{}"),
    ("GET", "/v1/sessions/{}"),
    ("DELETE", "/v1/sessions/{}"),
    ("POST", "/v1/sessions/{}/save"),
    ("POST", "/v1/sessions/{}/restore"),
    ("PUT", "/v1/chat/{}"),
    ("GET", "/{}"),
]
NAMES = ["a", "demo", "..", "../../etc/passwd", "%2e%2e%2fx", "a/b", "\x00", "é", "x" * 3000, "*", "?", "a\nb", "\\"]
JUNK: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2**31,
    2**63,
    -(2**63) - 1,
    10**400,
    0.5,
    1e308,
    "",
    "x",
    "0",
    "\x00",
    "\ud800",
    "日本" * 50,
    "../../etc/passwd",
    "{{ 7 * 7 }}",
    "<|im_start|>",
    "x" * 20_000,
    [],
    [[]],
    {},
    {"type": "object"},
    {"$ref": "#"},
    {"type": "text"},
    [None] * 9,
    [0] * 3000,
]
NAMES_ADDED = ["user", "seed", "x", "", "\ud800", "response_format", "n", "stream", "stop", "guided_regex", "model"]
FIELDS_ADDED: list[tuple[str, Any]] = [  # that most endpoints which generate do take
    ("stream", True),
    ("n", 3),
    ("temperature", 0),
    ("max_tokens", 500),
    ("min_tokens", 5),
    ("ignore_eos", True),
    ("top_k", 1),
    ("top_p", 0.01),
    ("stop", ["e", "\n"]),
    ("response_format", {"type": "json_object"}),
    ("guided_regex", "a*"),
    ("prompt_cache_key", "a"),
    ("priority", -3),
    ("include_stop_str_in_output", True),
    ("skip_special_tokens", False),
]


@dataclass(frozen=True, slots=True)
class Mutant:
    """One HTTP call."""

    method: str
    path: str
    content: bytes = b""
    content_type: str = JSON


def mutant(rng: random.Random, *, has_paths: bool = True) -> Mutant:
    """A random call; `has_paths`: sometimes one that is all path and no body."""
    if has_paths and rng.random() < 0.05:
        method, path = rng.choice(BARE)
        name = rng.choice(NAMES)
        return Mutant(method, path.format(quote(name, safe="" if rng.random() < 0.5 else "/.%")))
    path, body = rng.choice(BODIES)
    for _ in range(rng.choice([1, 1, 1, 1, 2, 3])):
        body = mutated(body, rng)
    kind = JSON if rng.random() < 0.98 else rng.choice(["text/plain", "", "multipart/form-data; boundary=x"])
    return Mutant("POST", path, encoded(body, rng), kind)


def mutated(value: Any, rng: random.Random, depth: int = 0) -> Any:
    """`value` with one thing in it replaced, dropped, doubled or added."""
    if isinstance(value, dict) and value and rng.random() < (0.85 if depth else 0.98):
        key = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.2:
            return value | {rng.choice(NAMES_ADDED): rng.choice(JUNK)}
        if kind < 0.4 and depth == 0:
            return value | dict([rng.choice(FIELDS_ADDED)])
        return value | {key: mutated(value[key], rng, depth + 1)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        return (
            value + value[at:]
            if rng.random() < 0.2
            else [*value[:at], mutated(value[at], rng, depth + 1), *value[at + 1 :]]
        )
    return rng.choice(JUNK)


def encoded(value: Any, rng: random.Random) -> bytes:
    """As JSON, sometimes cut, spoilt or nested."""
    body = json.dumps(value).encode()
    kind = rng.random()
    if kind < 0.03:
        return body[: rng.randrange(len(body) + 1)]
    if kind < 0.06:
        at = rng.randrange(len(body) + 1)
        return body[:at] + bytes([rng.randrange(256)]) + body[at:]
    if kind < 0.07:
        return b'{"x":' * 5000 + body
    if kind < 0.08:
        return body.replace(b'"x"', b"[" * 3000 + b"]" * 3000)
    return body
