"""Around every request: an id, a time, a log line, headers for browsers, limits on its body."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable
from http import HTTPStatus

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chunkplan.service.access.gate import CALLER
from chunkplan.service.errors import problem_response, unexpected

log = structlog.get_logger(__name__)

_GIVEN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_READING = {"GET", "HEAD"}


class RequestContext:
    """Names every request (``X-Request-ID``), measures and logs it, and answers what nobody else has
    answered.
    """

    def __init__(self, app: ASGIApp, answered: Callable[[str, str, int, float], None]) -> None:
        self._app = app
        self._answered = answered
        """Takes method, route, status and seconds of every request."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _GIVEN_ID.fullmatch(given) else secrets.token_hex(8)
        begin, status = time.perf_counter(), 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                for name, value in _SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                if scope["path"] == _DOCS_PATH:
                    headers["Content-Security-Policy"] = _DOCS_POLICY
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, send_named)
            except Exception as error:
                if status:  # the response is on its way already
                    raise
                await unexpected(Request(scope), error)(scope, receive, send_named)
            finally:
                self._record(scope, status or 500, time.perf_counter() - begin)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path_format", None) or "unmatched"
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._answered(method, route, status, seconds)
        is_routine = status < HTTPStatus.BAD_REQUEST and method in _READING
        write = log.debug if is_routine else log.info
        caller = scope.get(CALLER)
        who = {} if caller is None or caller.key_id is None else {"project": caller.project, "key": caller.key_id}
        milliseconds = round(seconds * 1e3, 1)
        write("request", method=method, path=scope["path"], status=status, milliseconds=milliseconds, **who)


_DOCS_PATH = "/docs"
_DOCS_POLICY = (
    "default-src 'none'; frame-ancestors 'none'; connect-src 'self'; "
    "script-src 'unsafe-inline' https://cdn.jsdelivr.net; style-src 'unsafe-inline' https://cdn.jsdelivr.net; "
    "img-src data: https://fastapi.tiangolo.com"
)
_SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_METHODS = {*_READING, "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}


_STRINGS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_OPENING = b"[{"
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def is_nested_deeper(text: bytes | bytearray, max_depth: int) -> bool:
    """Whether JSON text nests its arrays and objects deeper than that; found without parsing it."""
    if sum(map(text.count, (b"[", b"{"))) <= max_depth:
        return False
    depth = 0
    for bracket in _STRINGS.sub(b"", text).translate(None, _NO_BRACKETS):
        depth += 1 if bracket in _OPENING else -1
        if depth > max_depth:
            return True
    return False


class BodyLimit:
    """Refuses bodies that are too long: before reading when they say so, while reading when they do not; and
    text that is nested too deep, before anything parses it.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_upload_bytes: int, upload_path: str, max_depth: int) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_upload_bytes = max_upload_bytes
        self._upload_path = upload_path
        self._max_depth = max_depth

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_upload = scope["path"] == self._upload_path
        limit = self._max_upload_bytes if is_upload else self._max_bytes
        detail = f"the body is longer than {limit} bytes"
        declared = Headers(scope=scope).get("content-length", "0")
        if not declared.isdigit() or int(declared) > limit:
            response = problem_response(Request(scope), 413, "content_too_large", detail)
            await response(scope, receive, send)
            return
        received = 0
        text = bytearray()

        async def receive_limited() -> Message:
            nonlocal received
            message = await receive()
            part = message.get("body", b"")
            received += len(part)
            if received > limit:
                raise HTTPException(413, detail)
            if not is_upload:
                text.extend(part)
                if not message.get("more_body") and is_nested_deeper(text, self._max_depth):
                    raise HTTPException(400, f"the body is nested deeper than {self._max_depth} levels")
            return message

        await self._app(scope, receive_limited, send)
