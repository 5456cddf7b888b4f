"""The service against its own OpenAPI document: no defects, no answer that the document does not tell of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.data.service import Served, on_port, served

_CHECKS: list[Any] = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance,
    response_schema_conformance, negative_data_rejection,
]  # fmt: skip


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("schema"), most_studies=30) as started:
        yield started


@pytest.fixture(scope="module")
def address(service: Served) -> Iterator[str]:
    with on_port(service) as url:
        yield url


EXAMPLES = 15


def test_no_request_finds_a_defect_or_an_undocumented_answer(service: Served, address: str) -> None:
    config = SchemathesisConfig.from_dict({"max-stream-events": 4})  # what an event stream begins with
    document = schemathesis.openapi.from_url(
        f"{address}/v1/openapi.json", headers=service.reading, wait_for_schema=10, config=config
    )
    operations = [found.ok() for found in document.get_all_operations()]
    assert len(operations) >= 24
    for operation in operations:
        for mode in GenerationMode:

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
            def answers(case: Any) -> None:
                case.call_and_validate(headers=service.writing, checks=_CHECKS, timeout=30)

            try:
                answers()
            except Unsatisfiable:  # an operation without anything to be wrong in
                assert mode is GenerationMode.NEGATIVE
    counted = service.client.get("/v1/metrics", headers=service.reading).text
    for path in ("front", "trials", "events"):  # not refusals alone
        route = f"/v1/studies/{{name}}/{path}"
        assert f'rank_search_http_requests_total{{method="GET",route="{route}",status="200"}}' in counted
