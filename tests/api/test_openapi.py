"""The API's description: complete, and changed only on purpose."""

import json
from pathlib import Path

import pytest

from chunkplan.service.write_openapi import kept_document

SNAPSHOT = Path(__file__).parents[2] / "docs" / "openapi.json"


@pytest.fixture(scope="module")
def document():
    return json.loads(kept_document())


def test_the_description_is_the_one_that_is_kept(document):
    assert document == json.loads(SNAPSHOT.read_text()), (
        "the API has changed: if that is meant, run "
        "`python -m chunkplan.service.write_openapi docs/openapi.json` and commit it"
    )


def test_every_operation_says_what_it_does_and_what_can_go_wrong(document):
    problem = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemView"}}}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            where = f"{method} {path}"
            assert operation["description"], where
            errors = {status: answer for status, answer in operation["responses"].items() if status >= "400"}
            assert all(answer["content"] == problem for answer in errors.values()), where
            if path not in {"/healthz", "/readyz"}:
                assert operation["security"] == [{"API key": []}], where
                assert set(errors) >= {"401", "403", "429", "503"}, where
            if "application/json" in operation.get("requestBody", {}).get("content", {}):
                assert operation["requestBody"]["content"]["application/json"]["schema"]["examples"], where
    for name, schema in document["components"]["schemas"].items():
        assert "HTTPValidationError" not in name
        assert schema
