"""The server keeps to its own OpenAPI document, and survives what no document foresees."""

from __future__ import annotations

import random
from typing import Any

import httpx
import pytest

from scripts.mutants import BODIES, mutant
from server.app import create_app
from server.config import Settings
from server.metrics import Metrics
from tests.conftest import byte_level_tokenizer
from tests.server.fake_engine import FakeEngine, says


def make_app() -> Any:
    tokenizer = byte_level_tokenizer()
    return create_app(Settings(), FakeEngine(says(tokenizer, "the quick fox")), tokenizer, Metrics())


async def send_mutants(number: int) -> None:
    rng = random.Random(0)
    transport = httpx.ASGITransport(make_app(), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        for call in (mutant(rng) for _ in range(number)):
            headers = {"Content-Type": call.content_type}
            response = await client.request(call.method, call.path, content=call.content, headers=headers)
            assert response.status_code in (200, 400, 404, 405, 409), (call, response.text)
            assert "internal_error" not in response.text  # also within a stream
            if response.status_code != 200:
                assert response.json()["error"]["message"]


@pytest.mark.parametrize("path", sorted({path for path, _ in BODIES if "/sessions/" not in path}))
async def test_bodies_are_answered_before_they_are_changed(path: str) -> None:
    transport = httpx.ASGITransport(make_app())
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        for body in (body for other, body in BODIES if other == path):
            response = await client.post(path, json=body)
            assert response.status_code == 200, (body, response.text)


async def test_mutated_bodies_never_reach_a_defect() -> None:
    await send_mutants(500)


@pytest.mark.slow
async def test_many_mutated_bodies_never_reach_a_defect() -> None:
    await send_mutants(10_000)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_server_keeps_to_its_openapi_document() -> None:
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    schema = schemathesis.openapi.from_asgi("/openapi.json", make_app())
    for operation in schema.get_all_operations():

        @given(operation.ok().as_strategy())
        @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
        def check(case: Any) -> None:
            # fields that exclude each other cannot be told in a schema: a 400 may be the answer to valid data
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

        check()
