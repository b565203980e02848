"""The server: ``python -m service.serve``, or ``chunkplan serve``."""

from __future__ import annotations

import socket
import sys

import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError

from service.app import create_app
from service.errors import field_errors
from service.logs import configure_logging
from service.services import Services
from service.settings import Settings

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


def serve(settings: Settings) -> None:
    """Serves until SIGTERM or Ctrl-C; running attempts are then stopped at a checkpoint and queued again."""
    configure_logging(settings.log_format)
    app: FastAPI = create_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
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
    serve(settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
