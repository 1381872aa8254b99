"""What the server writes to stderr: a line for every request, and its own faults.

Nothing of a prompt, an answer, a header or a query string is ever in it, and no client can write a
line of its own: control characters are escaped, and what goes on in a second line is indented.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import traceback
from typing import Any, Literal
from urllib.parse import quote

from elastic_moe.server.observe.account import Account

LogFormat = Literal["text", "json"]
LEVELS = ("debug", "info", "warning", "error")
MAX_PATH = 200  # characters
WATCHED = {"/health", "/ready", "/metrics"}  # asked for every few seconds, so told in debug only
_OURS = "elastic_moe"
_FIELDS = "elastic_moe_fields"  # of a log record: those of a request
_NAMED = ("subnet", "prompt_tokens", "completion_tokens", "ttft_ms", "request_id")
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_log = logging.getLogger("elastic_moe.server.requests")


def configure(kind: LogFormat, level: str) -> None:
    """Have all that this process logs written to stderr, other libraries' warnings too.

    Args:
        level: the least of `LEVELS` that is written.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if kind == "json" else TextFormatter())
    least = getattr(logging, level.upper())
    logging.basicConfig(handlers=[handler], level=max(least, logging.WARNING), force=True)
    logging.getLogger(_OURS).setLevel(least)
    logging.captureWarnings(True)


def first_line(kind: LogFormat, text: str) -> str:
    """What a program says when it begins, whatever the level: as it is, or as JSON."""
    if kind == "text":
        return text
    return JsonFormatter().format(logging.LogRecord(_OURS, logging.INFO, "", 0, text, None, None))


def tell(account: Account) -> None:
    """Log a request that has ended."""
    level = logging.INFO
    if (account.status or 0) >= 500 or account.failed:
        level = logging.WARNING
    elif account.endpoint in WATCHED:
        level = logging.DEBUG
    if not _log.isEnabledFor(level):
        return
    fields = fields_of(account)
    parts = [f"{name}={fields[name]}" for name in _NAMED if fields[name] is not None]
    told = "{method} {path} {status} {outcome} {duration_ms}ms ".format_map(fields)
    _log.log(level, "%s", told + " ".join(parts), extra={_FIELDS: fields})


def fields_of(account: Account) -> dict[str, Any]:
    """What is told of a request. None: there is no such thing."""
    done = account.completions
    return {
        "method": quote(account.method),
        "path": _short(quote(account.path)),
        "status": account.status,
        "outcome": account.outcome,
        "duration_ms": _milliseconds(account.seconds),
        "subnet": account.subnet,
        "prompt_tokens": sum(one.usage.prompt_tokens for one in done) if done else None,
        "completion_tokens": sum(one.usage.completion_tokens for one in done) if done else None,
        "ttft_ms": _milliseconds(min(one.usage.ttft_seconds for one in done)) if done else None,
        "request_id": account.request_id,
    }


class JsonFormatter(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {"time": _time(record), "level": record.levelname.lower()}
        fields = getattr(record, _FIELDS, None)
        if fields is not None:
            return json.dumps({**told, "event": "request", **fields})
        return json.dumps({**told, "event": "message", "message": _message(record)})


class TextFormatter(logging.Formatter):
    """For people."""

    def format(self, record: logging.LogRecord) -> str:
        message = _CONTROL.sub(lambda found: ascii(found[0])[1:-1], _message(record))
        message = message.rstrip("\n").replace("\n", "\n    ")
        return f"{_time(record)} {record.levelname.lower()} {message}"


def _message(record: logging.LogRecord) -> str:
    """With the place of a failure, but not its own words, which may quote a prompt."""
    message = record.getMessage()
    if not record.name.startswith(_OURS):
        message = message.partition("\n")[0]  # asyncio goes on with the failure's words
    if record.exc_info and record.exc_info[0] is not None:
        kind, _, where = record.exc_info
        message += f" {kind.__name__}\n{''.join(traceback.format_tb(where))}"
    return message


def _time(record: logging.LogRecord) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{whole}.{int(record.msecs):03}Z"


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 1)


def _short(path: str) -> str:
    return path if len(path) <= MAX_PATH else f"{path[:MAX_PATH]}..."
