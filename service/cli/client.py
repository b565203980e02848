"""The service as the command line sees it: JSON in and out, problems as one line, events as they come."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Annotated, Any

import httpx
import typer

from chunkplan.service.cli.exits import DOES_NOT_FIT, FAILED, USAGE, CommandError
from chunkplan.service.job_states import JobState

DEFAULT_URL = "http://127.0.0.1:8321"
KEY_VARIABLE = "CHUNKPLAN_API_KEY"
"""Never an argument: those can be read by every user of the machine."""
UrlOption = Annotated[str, typer.Option("--url", envvar="CHUNKPLAN_URL", help="Where the service is.")]

_PLAN_SECONDS = 240.0
"""A submission plans first; the service gives that up sooner than this."""
_SILENCE_SECONDS = 60.0
_MAX_RECONNECTS = 60


class Client:
    """One service; a context manager. Asks with the API key in the environment, if there is one.

    Args:
        url: its address, without ``/v1``.
        reconnect_seconds: pause before a broken stream is opened again.
    """

    def __init__(self, url: str, reconnect_seconds: float = 1.0) -> None:
        self.url = url.rstrip("/")
        self._reconnect_seconds = reconnect_seconds
        key = os.environ.get(KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            self._http = httpx.Client(
                base_url=self.url, headers=headers, timeout=httpx.Timeout(_PLAN_SECONDS, connect=5.0)
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise CommandError(f"url: {self.url!r} is not an address: {error}", USAGE) from error

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def get(self, path: str, **query: Any) -> Any:
        """The JSON at a path.

        Raises:
            CommandError: the service cannot be reached, or answers with a problem.
        """
        return self._answer("GET", path, params={name: value for name, value in query.items() if value is not None})

    def post(self, path: str, body: Any = None, **query: Any) -> Any:
        """What the service answers to ``body``; raises as `get` does."""
        return self._answer("POST", path, json=body, params=query)

    def pages(self, path: str, limit: int | None = None, **query: Any) -> Iterator[Any]:
        """Rows of a list, page by page, at most ``limit`` of them."""
        after, num_rows = None, 0
        while True:
            page = self.get(path, after=after, limit=100, **query)
            for row in page["data"]:
                if num_rows == limit:
                    return
                yield row
                num_rows += 1
            if not page["has_more"]:
                return
            after = page["last_id"]

    def events(self, job_id: str) -> Iterator[dict[str, Any]]:
        """A job's events from the first on, until it has ended; survives a restart of the service.

        Raises:
            CommandError: the service stays away, or does not know the job.
        """
        last_event, num_failures = "0", 0
        while True:
            try:
                for event in self._stream(job_id, last_event):
                    last_event, num_failures = event["id"], 0
                    yield event
                if JobState(self.get(f"/v1/jobs/{job_id}")["state"]).is_final:
                    return
            except (httpx.TransportError, Unreachable) as error:
                num_failures += 1
                if num_failures > _MAX_RECONNECTS:
                    raise CommandError(f"lost {self.url}: {error}") from error
            time.sleep(self._reconnect_seconds)

    def _stream(self, job_id: str, last_event: str) -> Iterator[dict[str, Any]]:
        headers = {"Last-Event-ID": last_event, "Accept": "text/event-stream"}
        timeout = httpx.Timeout(_SILENCE_SECONDS, connect=5.0)
        path = f"/v1/jobs/{job_id}/events/stream"
        with self._http.stream("GET", path, headers=headers, timeout=timeout) as response:
            if response.status_code != httpx.codes.OK:
                response.read()
                raise _problem(response)
            for line in response.iter_lines():
                if line.startswith("data:"):
                    event: dict[str, Any] = json.loads(line.removeprefix("data:"))
                    yield event

    def _answer(self, method: str, path: str, **request: Any) -> Any:
        try:
            response = self._http.request(method, path, **request)
        except httpx.TransportError as error:
            raise Unreachable(f"cannot reach {self.url} ({error}); `chunkplan serve` starts the service") from error
        if response.is_error:
            raise _problem(response)
        return response.json()


class Unreachable(CommandError):
    """Nobody answers at the service's address."""


def _problem(response: httpx.Response) -> CommandError:
    try:
        problem = response.json()
    except ValueError:
        return CommandError(f"the service answered {response.status_code} {response.reason_phrase}")
    message = "; ".join(f"{item['field']}: {item['message']}" for item in problem.get("errors", []))
    message = message or problem.get("detail") or response.reason_phrase
    if response.status_code == httpx.codes.UNAUTHORIZED:
        message = f"{message} (set {KEY_VARIABLE}; `chunkplan keys create` makes one)"
    if problem.get("code") == "does_not_fit":
        return CommandError(message, DOES_NOT_FIT)
    return CommandError(message, USAGE if response.status_code in {400, 404, 409, 422} else FAILED)
