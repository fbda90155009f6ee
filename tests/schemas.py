"""Random JSON schemas of the kinds that a grammar can follow, for hypothesis."""

from __future__ import annotations

import re
from typing import Any

import jsonschema
from hypothesis import strategies as st

Schema = dict[str, Any]

SCALARS: list[Schema] = [
    {"type": "string", "maxLength": 5},
    {"type": "string", "minLength": 2, "maxLength": 12},
    {"type": "string", "enum": ["red", "grün", 'a"b']},
    {"type": "integer", "minimum": -5, "maximum": 300},
    {"type": "integer", "exclusiveMinimum": 0, "maximum": 9, "multipleOf": 3},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "boolean"},
    {"type": "null"},
    {"const": 7},
    {"enum": [1, "two", None, [3], {"four": 4}]},
    {"type": ["integer", "null"], "minimum": 0, "maximum": 99},
    {"type": "string", "pattern": "^[a-c]{1,3}$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
    {"$ref": "#/$defs/colour"},
]
DEFINITIONS: Schema = {"colour": {"type": "string", "enum": ["cyan", "magenta", "yellow"]}}


def _objects(values: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    def make(properties: dict[str, Schema], num_required: int) -> Schema:
        required = list(properties)[:num_required]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    return st.builds(make, st.dictionaries(st.sampled_from("abcd"), values, min_size=1), st.integers(0, 4))


def _arrays(values: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    def make(items: Schema, least: int, more: int) -> Schema:
        return {"type": "array", "items": items, "minItems": least, "maxItems": least + more}

    return st.builds(make, values, st.integers(0, 2), st.integers(0, 2))


def _tuples(values: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    def make(items: list[Schema]) -> Schema:
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}

    return st.builds(make, st.lists(values, min_size=1, max_size=3))


def _either(values: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    return st.builds(lambda options: {"anyOf": options}, st.lists(values, min_size=1, max_size=3))


def _with_definitions(schema: Schema) -> Schema:
    return schema | {"$defs": DEFINITIONS}


SCHEMAS: st.SearchStrategy[Schema] = st.recursive(
    st.sampled_from(SCALARS),
    lambda inner: st.one_of(_objects(inner), _arrays(inner), _tuples(inner), _either(inner)),
    max_leaves=8,
).map(_with_definitions)


def format_checker() -> jsonschema.FormatChecker:
    """All formats; but in a date, whether that year had a 29th of February is beyond a grammar."""
    checker = jsonschema.FormatChecker(set(jsonschema.FormatChecker.checkers) - {"date"})
    checker.checks("date")(_is_date)
    return checker


def _is_date(value: object) -> bool:
    return not isinstance(value, str) or re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])", value) is not None
