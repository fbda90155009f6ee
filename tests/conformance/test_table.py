"""The conformance table lists every endpoint and field that there is, and tests that exist."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api import wire
from server.api.wire.base import WireRequest
from server.api.wire.chat import ChatRequest
from server.api.wire.completions import CompletionRequest
from server.api.wire.generation import GenerationRequest
from server.api.wire.messages import CountTokensRequest, MessagesRequest
from server.api.wire.responses import ResponsesRequest
from server.api.wire.tokenize import TokenizeRequest
from tests.conformance.test_openapi import make_app

TESTS = Path(__file__).parent.parent
TABLE = (TESTS / "conformance" / "README.md").read_text()
README = (TESTS.parent / "README.md").read_text()


def request_models() -> dict[str, type[WireRequest]]:
    """Every wire model by its name."""
    for module in pkgutil.iter_modules(wire.__path__):
        importlib.import_module(f"{wire.__name__}.{module.name}")

    def below(model: type[WireRequest]) -> Iterator[type[WireRequest]]:
        yield model
        for child in model.__subclasses__():
            yield from below(child)

    return {model.__name__: model for model in below(WireRequest)}


def fields_of(model: type[WireRequest]) -> set[str]:
    """Names on the wire, unsupported ones included, without those of the common base that say the same."""
    inherited: set[str] = set()
    unsupported = set(model.unsupported)
    if model is not GenerationRequest and issubclass(model, GenerationRequest):
        inherited = set(GenerationRequest.model_fields) - set(model.__annotations__)
        unsupported -= set(GenerationRequest.unsupported)
    own = {field.alias or name for name, field in model.model_fields.items() if name not in inherited}
    return own | unsupported


def sections() -> dict[str, str]:
    """Text of the table's sections by the model in their titles."""
    found = re.findall(r"^##+ .*?`(\w+)`$\n(.*?)(?=^##|\Z)", TABLE, re.MULTILINE | re.DOTALL)
    return dict(found)


def rows(text: str) -> list[list[str]]:
    """Cells of all rows but the headings."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] not in ("Field", "Endpoint", "What", "Endpoint, field")]


def known_tests() -> set[str]:
    text = "\n".join(path.read_text() for path in TESTS.rglob("test_*.py"))
    return set(re.findall(r"def (test_\w+)\(", text))


LISTED = (
    "GenerationRequest ChatRequest CompletionRequest ResponsesRequest MessagesRequest CountTokensRequest "
    "TokenizeRequest DetokenizeRequest CreateSessionRequest PinRequest ForkRequest "
    "StreamOptions ChatMessage StructuredOutputs"
)


@pytest.mark.parametrize("name", LISTED.split())
def test_every_field_has_its_row(name: str) -> None:
    listed = [field for row in rows(sections()[name]) for field in re.findall(r"`(\w+)`", row[0])]
    assert len(listed) == len(set(listed)), "listed twice"
    assert set(listed) == fields_of(request_models()[name])


def test_every_body_has_its_section() -> None:
    bodies = {
        model.__name__
        for model in request_models().values()
        if model.__name__.endswith("Request") and model.__name__ not in ("WireRequest", "PromptRequest")
    }
    assert bodies <= set(sections())


def test_every_endpoint_is_listed() -> None:
    for path, methods in make_app().openapi()["paths"].items():
        for method in methods:
            shown = path.replace("{session_id}/", "{id}/") if method == "post" else path
            assert f"{method.upper()} {path}`" in TABLE or f"{method.upper()} {shown}`" in TABLE, (method, path)


@pytest.mark.parametrize("text", [TABLE, README], ids=["conformance", "readme"])
def test_every_row_names_tests_that_exist_and_says_what_happens(text: str) -> None:
    known = known_tests()
    with_tests = [row for row in rows(text) if len(row) == 4 and "test_" in row[1]]
    assert len(with_tests) > 10
    for row in with_tests:
        for name in re.findall(r"\b(test_\w+)`", row[1]):
            assert name in known, row
        assert all(row), row
    if text is TABLE:
        assert len(with_tests) == len(rows(text))


@pytest.mark.parametrize(
    ("path", "model", "body"),
    [
        ("/v1/chat/completions", ChatRequest, {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/completions", CompletionRequest, {"prompt": "x"}),
        ("/v1/responses", ResponsesRequest, {"input": "x"}),
        ("/v1/messages", MessagesRequest, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5}),
        ("/v1/messages/count_tokens", CountTokensRequest, {"messages": [{"role": "user", "content": "x"}]}),
        ("/tokenize", TokenizeRequest, {"prompt": "x"}),
    ],
)
async def test_every_unsupported_field_is_named(path: str, model: type[WireRequest], body: dict[str, Any]) -> None:
    transport = httpx.ASGITransport(make_app())
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        for name, neutral in model.unsupported.items():
            response = await client.post(path, json=body | {name: {"some": ["thing"]}})
            assert response.status_code == 400, name
            assert f"'{name}'" in response.json()["error"]["message"]
            for value in (None, *neutral):
                response = await client.post(path, json=body | {name: value})
                assert response.status_code == 200, (name, value, response.text)
        if model is ResponsesRequest:
            response = await client.post(path, json=body | {"top_logprobs": 3})
            assert (response.status_code, response.json()["error"]["param"]) == (400, "top_logprobs")
