"""For programs that start a server: where it is once it is ready, and its end with theirs."""

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
    """Yields what writes `url` and a line feed to a file; the file goes at the end.

    Raises:
        ServerError: no file can be there. It is tried at once.
    """
    if path is None:
        yield lambda: None
        return
    try:
        path.unlink(missing_ok=True)  # of a server that was killed
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ServerError(f"--url-file {path} cannot be written: {error.strerror}.") from error
    try:
        yield lambda: write_text(path, f"{url}\n")
    finally:
        path.unlink(missing_ok=True)


def end_with_stdin() -> None:
    """End this process as SIGTERM does when its standard input ends; returns at once.

    A pipe ends with the program that holds its other end, however that ends.
    """
    threading.Thread(target=_watch, name="elastic-moe stdin", daemon=True).start()


def _watch() -> None:
    # Not sys.stdin, whose lock would be held when the interpreter ends.
    while os.read(STDIN, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
