"""Structured logs, on standard error. No value in them can pass for a line of its own, and no API key is
in them.
"""

from __future__ import annotations

import logging
import re
import sys
from typing import Any

import structlog

from chunkplan.service.access.keys import SECRETS

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def configure_logging(log_format: str) -> None:
    """Sends structlog's and the standard library's records through one renderer: ``console`` or ``json``."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _one_line,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    last: list[structlog.typing.Processor] = (
        [_json_tracebacks(), structlog.processors.JSONRenderer()]
        if log_format == "json"
        else [
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
        ]
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last, _without_keys],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    for name in ("alembic", "uvicorn.access", "httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _one_line(logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Escapes control characters in what is logged: line breaks, and what terminals obey."""
    for name, value in event.items():
        if isinstance(value, str) and _CONTROL.search(value):
            event[name] = _CONTROL.sub(lambda found: repr(found[0])[1:-1], value.rstrip())
    return event


def _without_keys(logger: object, method: str, line: Any) -> str:
    """The rendered line; of an API key in it only the public half stays."""
    return SECRETS.sub(r"cpk_\1_…", line)


def _json_tracebacks() -> structlog.typing.Processor:
    """Tracebacks without the values of local variables: those may be secrets."""
    return structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False))
