"""Calls generated from the server's own OpenAPI document: none may make it fail.

FEWSTEP_SCHEMA_CALLS=500 makes as many per route and kind; a few are enough for every day.
"""

import contextlib
import os

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from live import Live, fake_server
from schemathesis.generation import GenerationMode

CALLS = int(os.environ.get("FEWSTEP_SCHEMA_CALLS", "3"))
QUICK = settings(
    max_examples=CALLS,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def live():
    with fake_server() as server:
        yield server


def calls(live: Live, operation, mode: GenerationMode) -> list[tuple[int, str]]:
    """Make generated calls of one operation; (status, what was sent where it was no success)."""
    seen = []

    @QUICK
    @given(case=operation.as_strategy(generation_mode=mode))
    def call(case):
        response = case.call(timeout=20)
        if response.status_code >= 400:
            assert "error" in response.json(), response.text
        seen.append((response.status_code, case.as_curl_command()[:500] if response.status_code >= 500 else ""))

    with contextlib.suppress(Unsatisfiable):  # a route that takes nothing cannot be called wrongly
        call()
    return seen


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_generated_call_makes_the_server_fail(live: Live, mode: GenerationMode):
    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json")
    seen = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        seen[operation.label] = calls(live, operation, mode)
    assert sum(len(made) for made in seen.values()) >= CALLS * 8
    assert {"POST /v1/images/edits", "POST /v1/jobs", "POST /sdapi/v1/txt2img", "GET /sdapi/v1/progress"} <= set(seen)
    assert {label: bad for label, made in seen.items() if (bad := [call for call in made if call[0] >= 500])} == {}
    assert 409 not in {status for made in seen.values() for status, _ in made}
    assert live.generate(steps=1).status_code == 200
