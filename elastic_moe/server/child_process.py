"""A server as the child of another program: tells it when it is ready, and exits with it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from elastic_moe.errors import ServerError
from elastic_moe.files import write_text

STDIN = 0


@contextmanager
def url_file(path: Path | None, url: str) -> Iterator[Callable[[], None]]:
    """Announce readiness: yields a function that writes the URL to `path`, deleted at the end.

    Args:
        path: None for no file.
        url: a line feed is appended.

    Raises:
        ServerError: the file cannot be written. This is tried at once.
    """
    if path is None:
        yield lambda: None
        return
    try:
        path.unlink(missing_ok=True)  # left by a server that was killed
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ServerError(f"--url-file {path} cannot be written: {error.strerror}.") from error
    try:
        yield lambda: write_text(path, f"{url}\n")
    finally:
        path.unlink(missing_ok=True)


def exit_with_stdin() -> None:
    """Send this process SIGTERM when its standard input ends; returns at once.

    A pipe to the parent ends with the parent, even if that is killed.
    """
    threading.Thread(target=_watch_stdin, name="elastic-moe stdin", daemon=True).start()


def _watch_stdin() -> None:
    # Not sys.stdin: its lock would be held when the interpreter exits.
    while os.read(STDIN, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
