"""Fields that say what an answer has to look like: OpenAI's `response_format`, vLLM's `structured_outputs`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from server.api.wire.base import Name, Text, WireRequest, check_json

Json = Annotated[Any, AfterValidator(check_json)]
Schema = Annotated[dict[str, Any] | bool, AfterValidator(check_json)]
Choices = Annotated[list[Annotated[Text, Field(min_length=1)]], Field(min_length=1, max_length=1024)]


class TextFormat(WireRequest):
    """Anything goes."""

    type: Literal["text"]


class JsonObjectFormat(WireRequest):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(WireRequest):
    """A JSON schema; it is always followed, `strict` or not."""

    name: Name
    description: Text | None = None
    json_schema: Schema = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(WireRequest):
    """JSON that validates against a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(WireRequest):
    """vLLM's way; exactly one of the fields."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "disable_additional_properties": (False,),
        "disable_any_whitespace": (True,),
        "disable_fallback": (True, False),
        "structural_tag": (),
        "whitespace_pattern": (),
    }

    json_schema: Schema | Text | None = Field(None, alias="json")
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None
    json_object: bool | None = None

    @model_validator(mode="after")
    def _check_one(self) -> StructuredOutputs:
        if sum(value is not None and value is not False for value in self.__dict__.values()) != 1:
            raise ValueError("exactly one of 'json', 'regex', 'choice', 'grammar' and 'json_object' is needed")
        return self
