"""The style of every picture: matplotlib settings, colours of both themes, shapes, SVG."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib.style
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from elastic_moe.lab.schema import full_values
from elastic_moe.lab.view.frontier import Point, Sweep, changed_axes
from elastic_moe.routing.axes import DEPTH, TOP_K, TRAINED

# One hex string per role: the report replaces each by a CSS variable, so that the same drawing
# serves a dark page. Blue and vermilion: Okabe and Ito's palette, safe for colour-blind readers.
INK, MUTED, GRID, PAPER = "#1c2127", "#5d6773", "#e3e7eb", "#fefefe"
BLUE, VERMILION = "#0072b2", "#d55e00"
LIGHT = {"ink": INK, "muted": MUTED, "grid": GRID, "paper": PAPER, "blue": BLUE, "red": VERMILION}
DARK = {
    "ink": "#e8eaed",
    "muted": "#a3adb8",
    "grid": "#30363d",
    "paper": "#15181c",
    "blue": "#56b4e9",
    "red": "#ff8c42",
}

# The shape says which axis besides depth and top-k was changed; a hexagon: more than one.
_SHOWN_BY_SHAPE = [axis for axis in TRAINED if axis not in (DEPTH, TOP_K)]
SHAPES = {
    "": "o",
    **{a.name: m for a, m in zip(_SHOWN_BY_SHAPE, "s^Dvp*X", strict=False)},
    "+": "h",
}
# The same shapes as paths of SVG, within 8 units of the origin.
PATHS = {
    "o": "M0-6A6 6 0 1 1-.01-6Z",
    "s": "M-5.5-5.5H5.5V5.5H-5.5Z",
    "^": "M0-6L6 6H-6Z",
    "D": "M0-7.5L7.5 0 0 7.5-7.5 0Z",
    "v": "M0 6L6-6H-6Z",
    "p": "M0-7L6.7-2.2 4.1 5.7H-4.1L-6.7-2.2Z",
    "*": "M0-7.5L1.7-2.3H7.1L2.7 .9 4.4 6.1 0 2.9-4.4 6.1-2.7 .9-7.1-2.3H-1.7Z",
    "X": "M-3.5-7L0-3.5 3.5-7 7-3.5 3.5 0 7 3.5 3.5 7 0 3.5-3.5 7-7 3.5-3.5 0-7-3.5Z",
    "h": "M0-7L6-3.5V3.5L0 7-6 3.5V-3.5Z",
}
SHAPE_NAMES = {
    "": f"{DEPTH.title.lower()}, {TOP_K.title.lower()}",
    **{axis.name: f"{axis.title.lower()} ({axis.letter})" for axis in _SHOWN_BY_SHAPE},
    "+": "several of these",
}


@contextmanager
def drawing_style() -> Iterator[None]:
    """matplotlib's own defaults plus ours, whatever the user's matplotlibrc says, then restored.

    Mathtext is off: a `$` in a file's name is a dollar sign. A character that the font lacks is
    drawn as a box, without a warning. Not thread-safe, as matplotlib's settings are not.
    """
    ours: dict[str, Any] = {
        "text.parse_math": False,
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "axes.facecolor": PAPER,
        "figure.facecolor": PAPER,
        "savefig.facecolor": PAPER,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "legend.frameon": False,
        "svg.fonttype": "none",  # text stays text: searchable, and in the page's own font
        "svg.hashsalt": "elastic-moe",  # equal input, equal ids
    }
    with matplotlib.style.context(["default", ours]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def depth_colours(depths: Sequence[int], *, dark: bool = False) -> dict[int, str]:
    """A colour per depth, from viridis without the end that fades into the page."""
    low, high = (0.22, 1.0) if dark else (0.0, 0.9)
    ranks = sorted(set(depths))
    span = max(1, len(ranks) - 1)
    shades = [high - (high - low) * i / span for i in range(len(ranks))]
    if dark:  # deepest: what stands out most, which is the brightest here
        shades.reverse()
    return {d: to_hex(colormaps["viridis"](s)) for d, s in zip(ranks, shades, strict=True)}


def shape_of(point: Point, sweep: Sweep) -> str:
    """The key in `SHAPES` for a point: '' for the depth and top-k grid."""
    keys = [a.name for a in changed_axes(point, full_values(sweep["model"])) if a.name in SHAPES]
    return "+" if len(keys) > 1 else "".join(keys)


def marker_size(k: int | None, max_k: int) -> float:
    """Diameter in typographic points; the area grows with k. None: no layer routes."""
    return math.sqrt(18 + 66 * (k or 0) / max(1, max_k))


def figure_to_svg(figure: Figure) -> str:
    """The figure as one SVG document. Equal figures give equal text: no date, salted ids."""
    buffer = io.StringIO()
    with drawing_style():
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
