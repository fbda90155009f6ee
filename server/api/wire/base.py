"""The base of all wire models: unknown fields are refused, unsupported ones are named.

`unsupported` lists fields that clients know from OpenAI or vLLM and that this server does not implement, with the
neutral values that ask for nothing and are let through; null always is.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

MAX_DEPTH = 64  # nesting of free-form JSON such as chat_template_kwargs


def _is_unicode(text: str) -> str:
    """JSON may escape half a surrogate pair, which no encoder takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"not valid Unicode: lone surrogate at character {error.start}") from None
    return text


Text = Annotated[str, AfterValidator(_is_unicode)]
Name = Annotated[Text, StringConstraints(min_length=1, max_length=512)]
SessionName = Annotated[Text, StringConstraints(min_length=1, max_length=512, pattern=r"^[^\x00-\x1f\x7f]+$")]


class WireRequest(BaseModel):
    """A request body or a part of one."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, neutral in cls.unsupported.items():
            if name in data and data[name] is not None and not any(_is_same(data[name], value) for value in neutral):
                raise PydanticCustomError(
                    "unsupported_parameter", "'{name}' is not supported with this value", {"name": name}
                )
        return {name: value for name, value in data.items() if name not in cls.unsupported}


class WireResponse(BaseModel):
    """A response body or a part of one; only fields that were set are written."""

    model_config = ConfigDict(protected_namespaces=())


def check_json(value: Any, depth: int = 0) -> Any:
    """`value`, unless it nests deeper than `MAX_DEPTH` or holds text that is not Unicode (ValueError)."""
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, str):
        _is_unicode(value)
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        check_json(child, depth + 1)
    return value


def _is_same(value: Any, neutral: Any) -> bool:
    """Equal, and not merely as True equals 1."""
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)
