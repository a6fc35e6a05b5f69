"""Structured logs on stderr: key=value for people, JSON for machines. A message is constant; what varies is a field."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, Literal

LEVELS = ("debug", "info", "warning", "error")
_FIELDS = "pynet_fields"


def configure(program: str, fmt: Literal["text", "json"] = "text", level: str = "info") -> None:
    """Send every log record of the process to stderr, once, in the chosen form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json(program) if fmt == "json" else _KeyValue(program))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for chatty in ("urllib3", "kubernetes", "asyncio"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLogger().level))


def get(name: str) -> logging.Logger:
    """Return the logger of a module."""
    return logging.getLogger(name)


def fields(**values: Any) -> dict[str, Any]:
    """Return what a log call takes as `extra`: `log.info("route added", extra=fields(dst=…))`."""
    return {_FIELDS: values}


def _record(program: str, record: logging.LogRecord) -> dict[str, Any]:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    entry: dict[str, Any] = {
        "time": f"{stamp}.{int(record.msecs):03d}Z",
        "level": record.levelname.lower(),
        "program": program,
        "msg": record.getMessage(),
    }
    entry.update(getattr(record, _FIELDS, {}))
    if record.exc_info:
        entry["trace"] = logging.Formatter().formatException(record.exc_info)
    return entry


class _KeyValue(logging.Formatter):
    def __init__(self, program: str) -> None:
        super().__init__()
        self._program = program

    def format(self, record: logging.LogRecord) -> str:
        return " ".join(f"{key}={_quoted(value)}" for key, value in _record(self._program, record).items())


class _Json(logging.Formatter):
    def __init__(self, program: str) -> None:
        super().__init__()
        self._program = program

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(_record(self._program, record), default=str, ensure_ascii=False)


def _quoted(value: Any) -> str:
    """Return `value` so that one record stays one line and splits at spaces outside of quotes."""
    text = str(value)
    if text and text.isprintable() and not any(mark in text for mark in ' "='):
        return text
    return json.dumps(text, ensure_ascii=False)
