"""Errors as exceptions that carry their status, rendered as RFC 9457 problems by one set of handlers.

    Problem
    ├── Unauthenticated 401 unauthenticated
    ├── Forbidden       403 code
    ├── NotFound        404 not_found
    ├── Conflict        409 code of the conflict
    │   └── DoesNotFit  409 does_not_fit, with predicted_bytes, available_bytes, alternatives
    ├── Unprocessable   422 code
    ├── TooMany         429 code, with Retry-After
    └── Busy            503 code, with Retry-After

`chunkplan.engine.errors.InputError` (422 invalid_input) is the one for bad input, wherever it is raised.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any, Literal

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import compile_path

from chunkplan.engine.errors import InputError
from chunkplan.engine.spec import error_field

MEDIA_TYPE = "application/problem+json"

log = structlog.get_logger(__name__)


class FieldError(BaseModel):
    """One offending field of the request."""

    field: str
    message: str


class ErrorView(BaseModel):
    """A problem once more, in the shape that the OpenAI clients read."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str


class ProblemView(BaseModel):
    """RFC 9457 problem details; some codes carry more members."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str
    errors: list[FieldError]
    error: ErrorView


class Problem(Exception):
    """Base of the service's own errors."""

    status = HTTPStatus.INTERNAL_SERVER_ERROR

    def __init__(self, code: str, detail: str, *, headers: Mapping[str, str] | None = None, **members: Any) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.headers = dict(headers or {})
        self.members = members


class Unauthenticated(Problem):
    """Nobody is let in without a valid key."""

    status = HTTPStatus.UNAUTHORIZED

    def __init__(self, detail: str) -> None:
        super().__init__("unauthenticated", detail, headers={"WWW-Authenticate": "Bearer"})


class Forbidden(Problem):
    """The caller is known, or of no matter, and this is not for them."""

    status = HTTPStatus.FORBIDDEN


class NotFound(Problem):
    """There is no such thing."""

    status = HTTPStatus.NOT_FOUND

    def __init__(self, noun: str, identifier: str) -> None:
        super().__init__("not_found", f"there is no {noun} {identifier!r}")


class Conflict(Problem):
    """The request contradicts the present state; clients that repeat every 409 are told that it
    is of no use.
    """

    status = HTTPStatus.CONFLICT

    def __init__(self, code: str, detail: str, **members: Any) -> None:
        super().__init__(code, detail, headers={"X-Should-Retry": "false"}, **members)


class DoesNotFit(Conflict):
    """Admission refuses: the plan's upper bound exceeds what the device offers."""

    def __init__(
        self, detail: str, *, predicted_bytes: int, available_bytes: int, alternatives: list[Any], plan_id: str
    ) -> None:
        super().__init__(
            "does_not_fit",
            detail,
            predicted_bytes=predicted_bytes,
            available_bytes=available_bytes,
            alternatives=alternatives,
            plan_id=plan_id,
        )


class Unprocessable(Problem):
    """The request is well-formed and cannot be carried out."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY


class TooMany(Problem):
    """The caller has had their share: come back after the given time."""

    status = HTTPStatus.TOO_MANY_REQUESTS

    def __init__(self, code: str, detail: str, *, retry_after_seconds: float) -> None:
        super().__init__(code, detail, headers={"Retry-After": str(max(1, math.ceil(retry_after_seconds)))})


class Busy(Problem):
    """Not now: come back after the given time."""

    status = HTTPStatus.SERVICE_UNAVAILABLE

    def __init__(self, code: str, detail: str, *, retry_after_seconds: int) -> None:
        super().__init__(code, detail, headers={"Retry-After": str(retry_after_seconds)})


def problem_response(
    request: Request,
    status: int,
    code: str,
    detail: str,
    *,
    errors: Iterable[tuple[str, str]] = (),
    headers: Mapping[str, str] | None = None,
    members: Mapping[str, Any] | None = None,
) -> Response:
    """A problem+json response."""
    fields = [{"field": field, "message": message} for field, message in errors]
    error = {
        "message": detail,
        "type": "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error",
        "param": fields[0]["field"] if fields else None,
        "code": code,
    }
    body = {
        "type": f"urn:chunkplan:problem:{code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "instance": request.url.path,
        "code": code,
        "errors": fields,
        "error": error,
        **(members or {}),
    }
    return JSONResponse(body, status_code=status, headers=dict(headers or {}), media_type=MEDIA_TYPE)


def field_errors(errors: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(field, message) of every pydantic error that says something: of a union's branches, those that got
    furthest.
    """
    found: dict[str, str] = {}
    for error in errors:
        is_of_request = tuple(error["loc"])[:1] in {("body",), ("query",), ("path",), ("header",)}
        field, message = error_field(error, skip=int(is_of_request)), str(error["msg"]).removeprefix("Value error, ")
        if error["type"] == "json_invalid":
            field, message = "", f"not valid JSON: {error.get('ctx', {}).get('error', message)}"
        found.setdefault(field or "request", message)
    return [item for item in found.items() if not any(other.startswith(f"{item[0]}.") for other in found)]


def respond(request: Request, error: Exception) -> Response:
    """The response to a `Problem`."""
    assert isinstance(error, Problem)
    return problem_response(
        request, error.status, error.code, error.detail, headers=error.headers, members=error.members
    )


def _input_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, InputError)
    return problem_response(request, 422, "invalid_input", str(error), errors=[(error.field, error.message)])


def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    errors = field_errors(error.errors())
    return problem_response(request, 422, "invalid_input", f"{errors[0][0]}: {errors[0][1]}", errors=errors)


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = HTTPStatus(error.status_code).name.lower()
    detail = str(error.detail)
    if error.status_code == HTTPStatus.NOT_FOUND:
        detail = f"there is nothing at {request.url.path}"
    headers = dict(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(_allowed_methods(request))
        detail = f"{request.method} is not allowed at {request.url.path}"
    return problem_response(request, error.status_code, code, detail, headers=headers)


def _allowed_methods(request: Request) -> list[str]:
    """Every method that the API documents for the request's path; a path without parameters comes first."""
    documented, path = request.app.openapi()["paths"], request.url.path
    matching = [methods for pattern, methods in documented.items() if compile_path(pattern)[0].match(path)]
    matching = [documented[path]] if path in documented else matching
    return sorted({method.upper() for methods in matching for method in methods})


def database_away(request: Request, error: Exception) -> Response:
    """The response when the database cannot be reached, or something there was locked for too long."""
    log.error("the database did not answer", path=request.url.path, error=type(error).__name__)
    return respond(request, Busy("database_unavailable", "the database does not answer", retry_after_seconds=5))


DATABASE_AWAY = (OperationalError, InterfaceError, PoolTimeout)
"""What the database raises when it is not there, or is locked."""


def unexpected(request: Request, error: Exception) -> Response:
    """The response to what should not have happened."""
    log.error("request failed", path=request.url.path, exc_info=error)
    return problem_response(request, 500, "internal_error", "something went wrong here; the log has it")


def install(app: FastAPI) -> None:
    """Registers the handlers; `unexpected` is called by the outermost middleware."""
    app.add_exception_handler(Problem, respond)
    for away in DATABASE_AWAY:
        app.add_exception_handler(away, database_away)
    app.add_exception_handler(InputError, _input_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
