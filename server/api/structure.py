"""From wire fields to the one grammar an answer has to follow."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from server.api.service import Service
from server.api.wire.generation import GenerationRequest
from server.api.wire.structure import JsonObjectFormat, JsonSchemaFormat, StructuredOutputs
from server.engine.constraint import LogitsConstraint
from server.engine.grammar import GrammarSpec
from server.errors import InvalidRequestError

ANY_OBJECT = {"type": "object"}

MakeConstraint = Callable[[], LogitsConstraint]


async def constraint(
    body: GenerationRequest, service: Service, forced: GrammarSpec | None = None
) -> MakeConstraint | None:
    """Compiles what the body asks for, or what is `forced` besides; None when nothing is.

    Raises InvalidRequestError for two demands at once, and for schemas that cannot be followed.
    """
    specs = [*_specs(body), *([forced] if forced else [])]
    if not specs:
        return None
    if len(specs) > 1:
        raise InvalidRequestError(f"'{specs[0].param}' and '{specs[1].param}' exclude each other", param=specs[1].param)
    return await service.grammars.compile(specs[0])


def _specs(body: GenerationRequest) -> Iterator[GrammarSpec]:
    """All demands, wherever they stand."""
    match body.response_format:
        case JsonObjectFormat():
            yield GrammarSpec("json_schema", ANY_OBJECT, "response_format")
        case JsonSchemaFormat(json_schema=named):
            yield GrammarSpec("json_schema", named.json_schema, "response_format")
    if body.structured_outputs is not None:
        yield _structured(body.structured_outputs)
    if body.guided_json is not None:
        yield GrammarSpec("json_schema", _schema(body.guided_json, "guided_json"), "guided_json")
    if body.guided_regex is not None:
        yield GrammarSpec("regex", body.guided_regex, "guided_regex")
    if body.guided_choice is not None:
        yield GrammarSpec("choice", body.guided_choice, "guided_choice")
    if body.guided_grammar is not None:
        yield GrammarSpec("grammar", body.guided_grammar, "guided_grammar")


def _structured(outputs: StructuredOutputs) -> GrammarSpec:
    param = "structured_outputs"
    if outputs.regex is not None:
        return GrammarSpec("regex", outputs.regex, param)
    if outputs.choice is not None:
        return GrammarSpec("choice", outputs.choice, param)
    if outputs.grammar is not None:
        return GrammarSpec("grammar", outputs.grammar, param)
    schema = ANY_OBJECT if outputs.json_schema is None else _schema(outputs.json_schema, param)
    return GrammarSpec("json_schema", schema, param)


def _schema(schema: dict[str, Any] | bool | str, param: str) -> Any:
    """vLLM also takes a schema as a string."""
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"'{param}' is not valid JSON: {error}", param=param) from None
