"""Tools in requests, and calls of them in messages, answers and stream chunks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints

from server.api.wire.base import Text, WireRequest, WireResponse, check_json

FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.:-]{1,64}$")]


class Function(WireRequest):
    """A function the model may call; `parameters` is a JSON schema of its arguments."""

    name: FunctionName
    description: Text | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(check_json)] | None = None
    strict: bool | None = None


class Tool(WireRequest):
    """Only functions are tools."""

    type: Literal["function"]
    function: Function


class NamedFunction(WireRequest):
    """Which function to call."""

    name: FunctionName


class NamedToolChoice(WireRequest):
    """The model has to call this function."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice
Tools = Annotated[list[Tool], Field(max_length=128)]


class CalledFunction(WireRequest):
    """A call in the conversation so far; `arguments` is JSON text."""

    name: Text
    arguments: Text


class ToolCall(WireRequest):
    """A call the assistant made earlier."""

    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction


class AnswerFunction(WireResponse):
    """Name and arguments of a call, or what a chunk adds to them."""

    name: str | None = None
    arguments: str | None = None


class AnswerToolCall(WireResponse):
    """A call in an answer."""

    id: str
    type: Literal["function"] = "function"
    function: AnswerFunction


class ToolCallDelta(WireResponse):
    """What a chunk adds to a call; id and name come with the first one."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: AnswerFunction
