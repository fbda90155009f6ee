"""From wire messages to a prompt: what chat templates expect, tools included."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from server.api.tools import with_tools, without_tool_roles
from server.api.wire.chat import ChatMessage
from server.api.wire.tools import Tool
from server.engine.tokenizer import Tokenizer
from server.errors import InvalidRequestError


async def encode_conversation(
    messages: Sequence[ChatMessage],
    tokenizer: Tokenizer,
    *,
    tools: Sequence[Tool] = (),
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    add_special_tokens: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[int, ...]:
    """Token ids of the prompt. Raises InvalidRequestError for messages a template refuses."""
    plain = [_template_message(message, tokenizer.chat_template, index) for index, message in enumerate(messages)]
    if "tool_calls" not in tokenizer.chat_template:
        plain = without_tool_roles(plain)
    told, tool_kwargs = with_tools(plain, tools, tokenizer.chat_template)
    return await tokenizer.encode_chat(
        told,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        add_special_tokens=add_special_tokens,
        template_kwargs={**(template_kwargs or {}), **tool_kwargs},
    )


def _template_message(message: ChatMessage, template: str, index: int) -> dict[str, Any]:
    """`developer` becomes `system` where the template does not know it."""
    role = "system" if message.role == "developer" and "developer" not in template else message.role
    optional = {
        "name": message.name,
        "tool_call_id": message.tool_call_id,
        "reasoning_content": message.reasoning_content,
        "tool_calls": [_call(message, position, index) for position in range(len(message.tool_calls or []))] or None,
    }
    given = {name: value for name, value in optional.items() if value is not None}
    return {"role": role, "content": message.text, **given}


def _call(message: ChatMessage, position: int, index: int) -> dict[str, Any]:
    """Templates write the arguments themselves and expect them as an object."""
    assert message.tool_calls is not None
    call = message.tool_calls[position]
    param = f"messages[{index}].tool_calls[{position}].function.arguments"
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        raise InvalidRequestError(f"'{param}' is not JSON", param=param) from None
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
