"""Random JSON schemas through the whole server and the bundled model: what was finished validates."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import httpx
import jsonschema
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.schemas import SCHEMAS, format_checker

MAX_TOKENS = 600  # a small model writes long strings; these schemas bound nearly everything
QUESTION = "Describe the quiet harbor as JSON."
CHECKER = format_checker()


def answer_to(client: httpx.Client, schema: dict[str, Any], seed: int, temperature: float) -> dict[str, Any]:
    body = {
        "messages": [{"role": "user", "content": QUESTION}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
        "max_tokens": MAX_TOKENS,
        "seed": seed,
        "temperature": temperature,
    }
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, (schema, response.text)
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def run(url: str, number: int) -> Counter[str]:
    """Asks for one answer to each of `number` schemas; counts them by their finish reason."""
    reasons: Counter[str] = Counter()
    with httpx.Client(base_url=url, timeout=120) as client:

        @given(SCHEMAS, st.integers(0, 2**32), st.sampled_from([0.0, 1.0, 2.0]))
        @settings(
            max_examples=number,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def check(schema: dict[str, Any], seed: int, temperature: float) -> None:
            choice = answer_to(client, schema, seed, temperature)
            reasons[choice["finish_reason"]] += 1
            if choice["finish_reason"] == "stop":
                jsonschema.validate(json.loads(choice["message"]["content"]), schema, format_checker=CHECKER)

        check()
    print(f"{number} schemas: {dict(reasons)}")
    return reasons


def test_finished_answers_validate(server):
    reasons = run(server.url, 12)
    assert set(reasons) <= {"stop", "length"}
    assert reasons["stop"] >= 10


@pytest.mark.slow
def test_finished_answers_to_200_schemas_validate(server):
    reasons = run(server.url, 200)
    assert reasons.total() >= 200
    assert set(reasons) <= {"stop", "length"}
    assert reasons["stop"] >= 190
