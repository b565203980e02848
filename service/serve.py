"""The server: ``python -m chunkplan.service.serve``, or ``chunkplan serve``."""

from __future__ import annotations

import socket
import sys

import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError

from chunkplan.engine.errors import InputError
from chunkplan.service.app import create_app
from chunkplan.service.db import upgrade
from chunkplan.service.errors import field_errors
from chunkplan.service.kit.clock import Clock
from chunkplan.service.operation.logs import configure_logging
from chunkplan.service.services import Services
from chunkplan.service.settings import Settings

_SHUTDOWN_SECONDS = 10
"""For requests in flight; running attempts have their own, longer, time."""


class Server(uvicorn.Server):
    """Tells the application that it is about to stop, so that streams end."""

    def __init__(self, config: uvicorn.Config, services: Services) -> None:
        super().__init__(config)
        self._services = services

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See `uvicorn.Server.shutdown`."""
        self._services.closing.set()
        await super().shutdown(sockets)


class OpenDoor(Exception):
    """The service would listen to others and nobody could have a key."""


def serve(settings: Settings, clock: Clock | None = None) -> None:
    """Serves until SIGTERM or Ctrl-C; running attempts are then stopped at a checkpoint and queued again.

    Args:
        settings: where and how.
        clock: by default the machine's.

    Raises:
        OpenDoor: the host is not loopback, and there is no valid key.
    """
    configure_logging(settings.log_format)
    app: FastAPI = create_app(settings, clock=clock)
    _check_door(settings, app.state.services)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
    )
    Server(config, app.state.services).run()


def main() -> int:
    """Entry point of the process."""
    try:
        settings = Settings()
    except ValidationError as error:
        for field, message in field_errors(error.errors()):
            print(f"CHUNKPLAN_{field.upper()}: {message}", file=sys.stderr)
        return 2
    except InputError as error:
        print(f"CHUNKPLAN_{error.field.upper()}: {error.message}", file=sys.stderr)
        return 2
    try:
        serve(settings)
    except OpenDoor as error:
        print(f"CHUNKPLAN_HOST: {error}", file=sys.stderr)
        return 2
    except InputError as error:  # what only this machine can tell: a declared device that is not here
        print(f"CHUNKPLAN_{error.field.upper()}: {error.message}", file=sys.stderr)
        return 2
    return 0


def _check_door(settings: Settings, services: Services) -> None:
    if not settings.requires_keys:
        return
    upgrade(settings.database_url)
    if not services.access.can_let_in():
        raise OpenDoor(
            f"{settings.host!r} is not loopback, and there is no valid API key: create one with `chunkplan keys "
            "create`, or bind to 127.0.0.1, or set CHUNKPLAN_TRUSTED_NETWORK=true where the network itself is closed"
        )


if __name__ == "__main__":
    sys.exit(main())
