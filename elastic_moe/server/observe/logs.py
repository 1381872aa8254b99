"""The log on stderr: one line per request, and the server's own errors.

It never holds prompts, answers, headers or query strings. No client can forge a line: control
characters are escaped, and continuation lines are indented.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import traceback
from typing import Literal
from urllib.parse import quote

from elastic_moe.server.observe.access_record import AccessRecord

LogFormat = Literal["text", "json"]
LEVELS = ("debug", "info", "warning", "error")
MAX_PATH = 200  # characters
POLLED = {"/health", "/ready", "/metrics"}  # every few seconds, so logged at debug only
_OURS = "elastic_moe"
_FIELDS = "elastic_moe_fields"  # attribute of a LogRecord
_TEXT_FIELDS = ("subnet", "prompt_tokens", "completion_tokens", "ttft_ms", "request_id")
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_log = logging.getLogger("elastic_moe.server.requests")


def configure(kind: LogFormat, level: str) -> None:
    """Write the logs of this process to stderr, warnings of other libraries included.

    Args:
        level: the lowest of `LEVELS` to write.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if kind == "json" else TextFormatter())
    lowest = getattr(logging, level.upper())
    logging.basicConfig(handlers=[handler], level=max(lowest, logging.WARNING), force=True)
    logging.getLogger(_OURS).setLevel(lowest)
    logging.captureWarnings(True)


def startup_line(kind: LogFormat, text: str) -> str:
    """A line that is written whatever the level: as text, or as JSON."""
    if kind == "text":
        return text
    return JsonFormatter().format(logging.LogRecord(_OURS, logging.INFO, "", 0, text, None, None))


def log_request(record: AccessRecord) -> None:
    """Log a request that has ended: failures at warning, polled endpoints at debug, else info."""
    level = logging.INFO
    if (record.status or 0) >= 500 or record.failed:
        level = logging.WARNING
    elif record.endpoint in POLLED:
        level = logging.DEBUG
    if not _log.isEnabledFor(level):
        return
    fields = request_fields(record)
    parts = [f"{name}={fields[name]}" for name in _TEXT_FIELDS if fields[name] is not None]
    line = "{method} {path} {status} {outcome} {duration_ms}ms ".format_map(fields)
    _log.log(level, "%s", line + " ".join(parts), extra={_FIELDS: fields})


def request_fields(record: AccessRecord) -> dict[str, str | int | float | None]:
    """The fields of a log line; None where the request has no such value."""
    done = record.completions
    return {
        "method": quote(record.method),
        "path": _truncated(quote(record.path)),
        "status": record.status,
        "outcome": record.outcome,
        "duration_ms": _milliseconds(record.seconds),
        "subnet": record.subnet,
        "prompt_tokens": sum(one.usage.prompt_tokens for one in done) if done else None,
        "completion_tokens": sum(one.usage.completion_tokens for one in done) if done else None,
        "ttft_ms": _milliseconds(min(one.usage.ttft_seconds for one in done)) if done else None,
        "request_id": record.request_id,
    }


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": _time(record), "level": record.levelname.lower()}
        fields = getattr(record, _FIELDS, None)
        if fields is not None:
            return json.dumps({**line, "event": "request", **fields})
        return json.dumps({**line, "event": "message", "message": _message(record)})


class TextFormatter(logging.Formatter):
    """A line for people to read."""

    def format(self, record: logging.LogRecord) -> str:
        message = _CONTROL.sub(lambda found: ascii(found[0])[1:-1], _message(record))
        message = message.rstrip("\n").replace("\n", "\n    ")
        return f"{_time(record)} {record.levelname.lower()} {message}"


def _message(record: logging.LogRecord) -> str:
    """The message, and the traceback of an exception without its text, which may quote a prompt."""
    message = record.getMessage()
    if not record.name.startswith(_OURS):
        message = message.partition("\n")[0]  # asyncio appends the exception's text
    if record.exc_info and record.exc_info[0] is not None:
        kind, _, where = record.exc_info
        message += f" {kind.__name__}\n{''.join(traceback.format_tb(where))}"
    return message


def _time(record: logging.LogRecord) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{whole}.{int(record.msecs):03}Z"


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 1)


def _truncated(path: str) -> str:
    return path if len(path) <= MAX_PATH else f"{path[:MAX_PATH]}..."
