"""Structured logs to stderr: one JSON object a line, or coloured text on a terminal. Nothing secret gets out.

Invariant: the standard library's loggers (of the libraries in use) come out in the same shape, and the Azure SDK's
and the access log's request lines do not come out below WARNING.
"""

from __future__ import annotations

import logging
import logging.handlers
import re
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, Final, Literal, TextIO

import structlog
from pydantic import BaseModel, ConfigDict

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["auto", "json", "console"]

REDACTED: Final = "[redacted]"
HELD_RECORDS_MAX: Final = 4096
_SECRET_KEY: Final = re.compile(
    r"(secret|passphrase|password|private_key|credential|connection_string|\bsas|_sas|token)(?!\w*_(file|path|id)\b)"
)
_SECRET_QUERY: Final = re.compile(r"((?:\bsig|AccountKey|SharedAccessSignature)=)[^&;\s\"']+", re.IGNORECASE)
_QUIET_LOGGERS: Final = ("azure", "aiohttp.access", "asyncio", "aiosqlite", "sqlalchemy", "alembic")


class LogSettings(BaseModel):
    """The `log` section of every program's settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    level: LogLevel = "info"
    format: LogFormat = "auto"
    """auto: console on a terminal, else json."""


def configure_logs(
    settings: LogSettings | None = None, *, program: str, stream: TextIO | None = None, is_final: bool = True
) -> None:
    """Sends all logs of this process to `stream` (stderr), each with the program's name.

    is_final: loggers keep it from their first use on, which is quicker. Until then a later call counts for all.
    """
    settings = settings or LogSettings()
    stream = stream or sys.stderr
    level = getattr(logging, settings.level.upper())
    as_console = settings.format == "console" or (settings.format == "auto" and stream.isatty())
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_shared_processors(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=is_final,
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(program=program)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_formatter(as_console=as_console))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in _QUIET_LOGGERS:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


@contextmanager
def held_logs() -> Iterator[None]:
    """What is logged within the block comes out at its end, unless it is more than HELD_RECORDS_MAX: for moments at
    which whoever takes the logs cannot write."""
    root = logging.getLogger()
    handlers = root.handlers[:]
    holders = [
        logging.handlers.MemoryHandler(HELD_RECORDS_MAX, flushLevel=logging.CRITICAL + 1, target=handler)
        for handler in handlers
    ]
    root.handlers[:] = holders
    try:
        yield
    finally:
        root.handlers[:] = handlers
        for holder in holders:
            holder.close()


def _shared_processors() -> list[structlog.typing.Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        redact,
    ]


def _formatter(*, as_console: bool) -> structlog.stdlib.ProcessorFormatter:
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=True) if as_console else structlog.processors.JSONRenderer(default=str)
    )
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=_shared_processors(),
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
    )


def redact(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor: hides values of secret-sounding keys, signatures in URLs, and all raw bytes."""
    for key, value in event.items():
        if _SECRET_KEY.search(key):
            event[key] = REDACTED
        elif isinstance(value, bytes | bytearray | memoryview):
            event[key] = f"[{len(value)} bytes]"
        elif isinstance(value, str) and "=" in value:
            event[key] = _SECRET_QUERY.sub(rf"\1{REDACTED}", value)
    return event
