"""What the server logs: as lines for people, or as JSON for machines, neither with anything of a user's data in it.

A request is logged by its route's pattern, never by its path, query or body. Of an exception its type and where it came
from are told; its message too where only the system or the model's library can have written it: others quote values.
"""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from enum import StrEnum
from types import TracebackType
from typing import Any

REQUEST: ContextVar[str | None] = ContextVar("adapterhub_request", default=None)  # the id of the one under way
ACCESS = logging.getLogger("adapterhub.access")
_TELLING = (OSError, MemoryError, RuntimeError)  # torch's errors are RuntimeErrors: they tell of shapes and memory
_NOISY = ("httpx", "transformers", "uvicorn", "opentelemetry")


class LogFormat(StrEnum):
    TEXT = "text"
    JSON = "json"


def set_up_logs(form: LogFormat) -> None:
    """For the process; answered requests are logged in JSON alone."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if form is LogFormat.JSON else Lines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    ACCESS.setLevel(logging.INFO if form is LogFormat.JSON else logging.WARNING)


@contextmanager
def of_request(identity: str) -> Iterator[None]:
    """What is logged meanwhile, by the same task, belongs to this request."""
    token = REQUEST.set(identity)
    try:
        yield
    finally:
        REQUEST.reset(token)


class Lines(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        record.exc_text = None  # another formatter's
        text = super().format(record)
        identity = REQUEST.get()
        return f"{text} ({identity})" if identity and not record.exc_info else text

    def formatException(self, ei: Any) -> str:
        return "\n".join([f"{_what(ei[1])} at", *(f"  {place}" for place in _places(ei[2]))])


class JsonLines(logging.Formatter):
    """One object on each line. `extra={"data": {...}}` adds fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": REQUEST.get(),
            **getattr(record, "data", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line |= {"error": _what(record.exc_info[1]), "at": list(_places(record.exc_info[2]))}
        return json.dumps(line)


def _is_news(record: logging.LogRecord) -> bool:
    """uvicorn tells again of an exception that the application has logged and answered."""
    return not record.getMessage().startswith("Exception in ASGI application")


def _what(error: BaseException | None) -> str:
    name = type(error).__name__
    return f"{name}: {error}" if isinstance(error, _TELLING) else name


def _places(trace: TracebackType | None) -> Iterator[str]:
    for frame in traceback.extract_tb(trace):
        yield f"{frame.filename}:{frame.lineno} {frame.name}"
