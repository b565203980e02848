"""The API's description: what FastAPI finds out, and what can go wrong where, which follows from method and
path.

``python -m chunkplan.service.http.openapi docs/openapi.json`` writes the copy that is kept, and that a test
compares.
"""

from __future__ import annotations

import json
import sys
import tempfile
from http import HTTPStatus
from pathlib import Path
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


def kept_document() -> str:
    """The document of this code as it is kept; the version number is left to the running service."""
    from chunkplan.service.app import create_app
    from chunkplan.service.settings import Settings

    with tempfile.TemporaryDirectory() as folder:
        app = create_app(Settings(data_dir=Path(folder), database_url=f"sqlite:///{folder}/openapi.db"))
        document = describe(app)
        app.state.services.database.dispose()
    document["info"]["version"] = "0"
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(kept_document())
