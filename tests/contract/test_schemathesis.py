"""The emulator against the vendor's schema, with requests that schemathesis generates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from vendor_schema import needs_schema, read_corrected_schema

from cloudinary_analyze.emulator import Emulator
from cloudinary_analyze.testing.emulator import run_emulator

pytestmark = [needs_schema, pytest.mark.slow]
EXAMPLES = 15  # per operation and mode


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    # nothing is posted anywhere
    with run_emulator(Emulator(on_delivery=bool, count_sources=False)) as emulator:
        yield emulator


@pytest.mark.parametrize("valid", [True, False], ids=["valid", "invalid"])
def test_generated_requests_are_answered_as_documented(emulator: Emulator, valid: bool) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis import GenerationMode
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        negative_data_rejection,
        positive_data_acceptance,
        response_schema_conformance,
        status_code_conformance,
    )

    document = read_corrected_schema()
    del document["servers"]
    schema = schemathesis.openapi.from_dict(document)
    mode = GenerationMode.POSITIVE if valid else GenerationMode.NEGATIVE
    checks = [
        not_a_server_error,
        status_code_conformance,
        content_type_conformance,
        response_schema_conformance,
        positive_data_acceptance if valid else negative_data_rejection,
    ]
    base_url = f"{emulator.url}/v2/analysis/{emulator.cloud_name}"
    auth = (emulator.api_key, emulator.api_secret)
    statuses: Counter[int] = Counter()
    for found in schema.get_all_operations():
        operation = found.ok()

        @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
        @given(operation.as_strategy(generation_mode=mode))
        def check(case) -> None:
            response = case.call(base_url=base_url, auth=auth)
            statuses[response.status_code] += 1
            case.validate_response(response, checks=checks)

        check()
    assert sum(statuses.values()) > 16 * 5
    print(f"schemathesis, {'valid' if valid else 'invalid'}: {dict(statuses)}")
