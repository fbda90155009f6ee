"""The real engine keeps to the OpenAPI document that the server itself gives out."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_server_keeps_to_its_openapi_document(start_server):
    """No 5xx, no status, type or shape that the document does not tell, and invalid data is refused."""
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    url = start_server("--max-model-len", "600", "--kv-host-memory", "64MiB").url
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    statuses: dict[str, set[int]] = {}
    for operation in schema.get_all_operations():
        found = statuses.setdefault(f"{operation.ok().method.upper()} {operation.ok().path}", set())

        @given(operation.ok().as_strategy())
        @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        def check(case: Any, found: set[int] = found) -> None:
            # fields that exclude each other cannot be told in a schema: a 400 may be the answer to valid data
            response = case.call_and_validate(excluded_checks=[positive_data_acceptance], timeout=120)
            found.add(response.status_code)

        check()
    print(statuses)
    assert not any(status >= 500 for found in statuses.values() for status in found)
