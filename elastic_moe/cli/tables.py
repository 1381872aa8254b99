"""Tables for a terminal: what does not fit is left out by the column, never cut within a number."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPE_COLUMNS = 100  # a pipe has no width of its own


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        heading: "" for the first column of words.
        cells: one for each row.
        keep: among columns that do not fit, the one with the lowest goes first.
    """

    heading: str
    cells: Sequence[str]
    keep: int


def make_console() -> Console:
    """A console on standard output, as wide as the terminal or COLUMNS; 100 columns in a pipe.

    Without markup: names of models, texts and folders may hold brackets and colons.
    """
    from rich.console import Console  # deferred: slow to load

    known = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit()
    width = None if known else PIPE_COLUMNS
    return Console(highlight=False, markup=False, emoji=False, width=width)


def print_table(console: Console, columns: Sequence[Column], **style: Any) -> None:
    """Print the columns that fit, the first one always, and name those that do not.

    Args:
        style: of `rich.table.Table`.
    """
    from rich.measure import Measurement

    unlimited = console.options.update(max_width=10_000)
    shown, left_out = list(columns), []
    while True:
        table = _make_table(shown, **style)
        needed = Measurement.get(console, unlimited, table).maximum
        if needed <= console.width or len(shown) == 1:
            break
        least = min(shown[1:], key=lambda column: column.keep)
        shown.remove(least)
        left_out.append(least)
    console.print(table)
    if left_out:
        names = ", ".join(column.heading for column in columns if column in left_out)
        console.print(f"left out, for {console.width} columns: {names}")


def _make_table(columns: Sequence[Column], **style: Any) -> Table:
    from rich.table import Table

    table = Table(**{"pad_edge": False, "collapse_padding": True, **style})
    for i, column in enumerate(columns):
        if i == 0:
            table.add_column(column.heading, overflow="fold")
        else:
            table.add_column(column.heading, justify="right", no_wrap=True)
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*row)
    return table
