"""Tools: how a model is told of them, made to use them, and how its calls are read.

The chat template decides how a model writes its calls; where it knows no tools, the model is told in Hermes' words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from server.api.parts.base import PartParser, PlainParser
from server.api.parts.forced import NamedParser, RequiredParser
from server.api.parts.hermes import HermesParser
from server.api.parts.llama3 import PYTHON_TAG, Llama3Parser
from server.api.service import ToolParserName
from server.api.wire.chat import ChatRequest
from server.api.wire.tools import NamedToolChoice, Tool
from server.engine.grammar import GrammarSpec
from server.errors import InvalidRequestError

PREAMBLE = """You may call functions. Their signatures are within <tools></tools>:
<tools>
{tools}
</tools>
To call one, answer with its name and arguments as JSON within tags:
<tool_call>
{{"name": NAME, "arguments": ARGUMENTS}}
</tool_call>"""


def offered_tools(body: ChatRequest) -> Sequence[Tool]:
    """Tools the model is told of. Raises InvalidRequestError for a choice among none."""
    tools = body.tools or []
    choice = body.tool_choice
    if not tools and choice not in (None, "none", "auto"):
        raise InvalidRequestError("'tool_choice' needs 'tools'", param="tool_choice")
    if isinstance(choice, NamedToolChoice) and choice.function.name not in {tool.function.name for tool in tools}:
        raise InvalidRequestError(f"'tool_choice' names no tool: '{choice.function.name}'", param="tool_choice")
    return [] if choice == "none" else tools


def forced_calls(body: ChatRequest) -> GrammarSpec | None:
    """The grammar of an answer that has to be a call; None when the model is free."""
    tools = offered_tools(body)
    if isinstance(body.tool_choice, NamedToolChoice):
        named = next(tool for tool in tools if tool.function.name == body.tool_choice.function.name)
        return GrammarSpec("json_schema", _parameters(named), "tools")
    if body.tool_choice != "required":
        return None
    calls: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": [_call_schema(tool) for tool in tools]}}
    if body.parallel_tool_calls is False:
        calls["maxItems"] = 1
    return GrammarSpec("json_schema", calls, "tools")


def parser_maker(body: ChatRequest, parser: ToolParserName, template: str) -> Callable[[], PartParser]:
    """What makes a parser for each choice of this call."""
    tools = offered_tools(body)
    if not tools:
        return PlainParser
    choice = body.tool_choice
    if isinstance(choice, NamedToolChoice):
        return lambda: NamedParser(choice.function.name)
    if choice == "required":
        return RequiredParser
    is_llama = parser == "llama3_json" or (parser == "auto" and _writes_like_llama3(template))
    return Llama3Parser if is_llama else HermesParser


def with_tools(
    messages: list[dict[str, Any]], tools: Sequence[Tool], template: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Messages and template arguments that tell the model of its tools."""
    listed = [tool.model_dump(exclude_none=True) for tool in tools]
    if not listed or "tools" in template:
        return messages, {"tools": listed} if listed else {}
    text = PREAMBLE.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in listed))
    return _with_system_text(messages, text), {}


def without_tool_roles(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls and their results as plain text in Hermes' tags, for templates that know neither."""
    return [_as_text(message) for message in messages]


def _writes_like_llama3(template: str) -> bool:
    return "<tool_call>" not in template and (PYTHON_TAG in template or '"parameters"' in template)


def _parameters(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}


def _call_schema(tool: Tool) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, "parameters": _parameters(tool)},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _with_system_text(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    if messages and messages[0]["role"] == "system":
        first = messages[0] | {"content": f"{messages[0]['content']}\n\n{text}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = message.get("tool_calls", [])
    written = [f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>" for call in calls]
    content = "\n".join(filter(None, [message["content"], *written]))
    return {name: value for name, value in message.items() if name != "tool_calls"} | {"content": content}
