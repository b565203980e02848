"""The API's description: what FastAPI finds out, and what can go wrong where, by method and path."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from chunkplan.service.access.gate import OPEN_PATHS

_PROBLEM = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemView"}}}


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of an application; made once."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                _add_problems(path, method, operation)
        app.openapi_schema = document
    return app.openapi_schema


def _add_problems(path: str, method: str, operation: dict[str, Any]) -> None:
    responses = operation["responses"]
    responses.pop("default", None)
    for status in _problems(path, method, operation) | {int(code) for code in responses if code >= "400"}:
        responses[str(status)] = {"description": HTTPStatus(status).phrase, "content": _PROBLEM}


def _problems(path: str, method: str, operation: dict[str, Any]) -> set[int]:
    found = set() if path == "/healthz" else {503}
    if path not in OPEN_PATHS:
        found |= {401, 403, 429}
    if "{" in path:
        found.add(404)
    if "parameters" in operation or "requestBody" in operation:
        found.add(422)
    if "requestBody" in operation:
        found |= {400, 413}
    if method != "get":
        found |= {409, 413}
    return found
