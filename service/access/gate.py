"""The gate in front of every route: whoever is not let in has sent nothing but headers.

A request needs a valid key once there is any key, or when the service listens to more than this machine.
Until then anybody on this machine may do everything; browsers are the exception, because any web page can
make them ask.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from anyio import CapacityLimiter, to_thread
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from chunkplan.service.access.keys import ANYBODY, Caller
from chunkplan.service.access.keys import Scope as KeyScope
from chunkplan.service.access.limits import Buckets
from chunkplan.service.access.service import Access
from chunkplan.service.errors import DATABASE_AWAY, Forbidden, Problem, Unauthenticated, database_away, respond
from chunkplan.service.kit.clock import Clock
from chunkplan.service.settings import Settings

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/openapi.json", "/docs"})
"""They show nothing of anybody's."""
CALLER = "chunkplan.caller"
"""Key of a request's scope under which routes find the `Caller`."""

_READING = frozenset({"GET", "HEAD"})
_MAX_LOOKUPS = 8


class Gate:
    """Lets a request in as somebody, or answers it itself."""

    def __init__(self, app: ASGIApp, access: Access, settings: Settings, clock: Clock) -> None:
        self._app = app
        self._access = access
        self._settings = settings
        self._buckets = Buckets(clock)
        self._failures = Buckets(clock)
        self._threads: CapacityLimiter | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        self._threads = self._threads or CapacityLimiter(_MAX_LOOKUPS)  # its own: routes cannot starve it
        try:
            scope[CALLER] = await to_thread.run_sync(self._admit, request, limiter=self._threads)
        except Problem as error:
            await respond(request, error)(scope, receive, send)
        except DATABASE_AWAY as error:
            await database_away(request, error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _admit(self, request: Request) -> Caller:
        caller = self._identify(request)
        require(caller, KeyScope.READ if request.method in _READING else KeyScope.SUBMIT)
        if caller.key_id is not None:
            quota = self._settings.quota_of(caller.project)
            self._buckets.take(caller.key_id, quota.requests_per_second, quota.requests_burst)
        return caller

    def _identify(self, request: Request) -> Caller:
        if not self._settings.requires_keys and not self._access.is_required():
            _check_sender(request.headers, self._settings.allowed_hosts)
            return ANYBODY
        try:
            scheme, _, text = request.headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer":
                raise Unauthenticated("send an API key: Authorization: Bearer cpk_…")
            return self._access.recognise(text.strip())
        except Unauthenticated:
            address = request.client.host if request.client else ""
            self._failures.take(address, self._settings.refusals_per_second, self._settings.refusals_burst)
            raise


def require(caller: Caller, scope: KeyScope) -> None:
    """Lets a caller pass who has a scope.

    Raises:
        Forbidden: they have not.
    """
    if scope not in caller.scopes:
        raise Forbidden("scope_missing", f"this needs a key with the scope {scope}")


def _check_sender(headers: Headers, allowed_hosts: list[str]) -> None:
    """Keeps web pages and proxies from using the open door of this machine.

    Raises:
        Forbidden: the request was made for another host (DNS rebinding), by a page of another site, or by a
            proxy.
    """
    host = headers.get("host", "")
    if not _is_named_directly(host, allowed_hosts):
        raise Forbidden("host_not_allowed", f"the host {host!r} is not in CHUNKPLAN_ALLOWED_HOSTS; or use an API key")
    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
    if (origin is not None and origin.partition("://")[2] != host) or site not in {"none", "same-origin"}:
        raise Forbidden("cross_origin", "pages of other sites need an API key")
    if "forwarded" in headers or "x-forwarded-for" in headers:
        raise Forbidden("proxy_without_keys", "requests through a proxy need an API key: create one first")


def _is_named_directly(host: str, allowed_hosts: list[str]) -> bool:
    """Whether a Host header names an address, ``localhost``, or what is allowed: no name that others can
    point here.
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if name == "localhost" or name in allowed_hosts:
            return True
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
