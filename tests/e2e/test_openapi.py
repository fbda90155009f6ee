"""The real engine keeps to the OpenAPI document that the server itself gives out."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

NEEDED = {"messages", "prompt", "input", "max_tokens", "tokens"}
LENGTHS = {"max_tokens", "max_completion_tokens", "max_output_tokens"}
MAX_OPTIONAL = 3


def thinned(body: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A body with what it needs and a few other fields, and short: with all there are, some exclude each other nearly
    always."""
    if {"prompt", "messages"} <= body.keys():
        dropped = rng.choice(["prompt", "messages"])
        body = {name: value for name, value in body.items() if name != dropped}
    optional = [name for name in body if name not in NEEDED | {"model"}]
    kept = NEEDED | set(rng.sample(optional, min(len(optional), rng.randint(0, MAX_OPTIONAL))))
    thin = {name: value for name, value in body.items() if name in kept}
    if isinstance(thin.get("messages"), list):
        thin["messages"] = [with_content(message) for message in thin["messages"]]
    return thin | {name: 20 for name in LENGTHS & thin.keys() if isinstance(thin[name], int)}


def with_content(message: Any) -> Any:
    """Nearly all messages need some, which their schema does not say."""
    if isinstance(message, dict) and message.get("content") is None:
        return message | {"content": "x"}
    return message


def check_operation(operation: Any, mode: GenerationMode, number: int) -> Counter[int]:
    """Calls it with valid or with invalid data; any check that fails raises. Counts the statuses."""
    statuses: Counter[int] = Counter()

    @given(operation.as_strategy(generation_mode=mode), st.integers(0, 2**32))
    @settings(max_examples=number, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def check(case: Any, seed: int) -> None:
        rng = random.Random(seed)
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict) and rng.random() < 0.8:
            case.body = thinned(case.body, rng)
        # fields that exclude each other cannot be told in a schema: a 400 may be the answer to valid data
        response = case.call_and_validate(excluded_checks=[positive_data_acceptance], timeout=120)
        statuses[response.status_code] += 1

    check()
    return statuses


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_server_keeps_to_its_openapi_document(start_server):
    """No 5xx; no status, type or shape that the document does not tell; what it excludes is refused."""
    url = start_server("--max-model-len", "400", "--kv-host-memory", "64MiB").url
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    total: Counter[int] = Counter()
    for found in schema.get_all_operations():
        operation = found.ok()
        statuses = check_operation(operation, GenerationMode.POSITIVE, 40)
        if any(body.is_required for body in operation.body):  # else it takes null for wrong
            statuses += check_operation(operation, GenerationMode.NEGATIVE, 20)
        print(operation.method.upper(), operation.path, dict(statuses))
        total += statuses
    print("in all", dict(total))
    assert total[200] > 200
    assert not [status for status in total if status >= 500]
