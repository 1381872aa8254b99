"""`report.html`: a sweep as one self-contained page.

The page asks nothing of the network, and its content security policy forbids it to: names in a
sweep come from files of unknown origin, so everything is escaped, and only the script whose hash
the page names may run. Equal sweeps give equal bytes.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from elastic_moe.files import write_text
from elastic_moe.lab.load import busy_warning
from elastic_moe.lab.schema import full_values, with_every_field
from elastic_moe.lab.view.frontier import (
    Point,
    Sweep,
    clean,
    curves,
    decode_speed,
    finite,
    flops,
    format_error,
    format_percent,
    format_range,
    format_si,
    format_speed,
    format_value,
    full_point,
    pick,
    ranking,
    threshold_cost_is_measured,
    trained_points,
    untrained_axes,
    use_layers,
)
from elastic_moe.lab.view.frontier_plot import Panel, frontier_figure
from elastic_moe.lab.view.report_plots import curve_figure, expert_use_figure
from elastic_moe.lab.view.style import (
    DARK,
    LIGHT,
    PATHS,
    SHAPE_NAMES,
    SHAPES,
    depth_colours,
    figure_to_svg,
    marker_size,
    shape_of,
)
from elastic_moe.routing.axes import DEPTH, TOP_K, TRAINED

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
REFERENCES = ("clip-path", f"{{{XLINK}}}href")  # attributes that point at an id


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of the table: what it shows, what it sorts by, and a mark for a screen reader."""

    text: str
    key: str | float
    untrained: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One sub-network of the table. `index` is its place in `sweep["points"]`."""

    index: int
    name: str
    pareto: bool
    trained: bool
    cells: tuple[Cell, ...]


# (heading, what it means); Pareto and name come before, from the template.
COLUMNS = (
    ("bits/byte", "lower is better"),
    ("Δ nats ± 2 SE", "mean loss per token minus the full network's; paired standard error"),
    ("FLOPs", "floating-point operations per token"),
    ("% of full", "FLOPs per token, relative to the full network's"),
    ("decode", "measured, tokens per second, one sequence: median, slowest and fastest round"),
    ("prefill", "measured, tokens per second: median, slowest and fastest round"),
    ("agreement", "how often its likeliest token is the full network's"),
    ("KL", "divergence of its predictions from the full network's, nats per token"),
    ("perplexity", "per token; lower is better"),
    *((axis.title.lower(), axis.unit) for axis in TRAINED),
    ("experts", "mean number of experts that ran, per token and layer"),
    ("params", "active parameters: those that one token uses"),
    ("at most", "upper bound of the active parameters: no expert dropped"),
    ("weights", "bytes of weights that one token reads"),
)


def write_report(sweep: Sweep, path: str | Path) -> None:
    """Write the page of a sweep, complete or not, to `path`, all or nothing."""
    write_text(Path(path), render_report(sweep))


def render_report(sweep: Sweep) -> str:
    """The page as text. The template holds the words; here are the numbers and the drawings."""
    sweep = with_every_field(sweep)
    folder = resources.files("elastic_moe.lab.view")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(clean=clean, value=format_value)
    template = environment.from_string((folder / "report.html.j2").read_text("utf-8"))
    script = (folder / "report.js").read_text("utf-8")
    points, model = sweep["points"], sweep["model"]
    full = full_point(points)
    depths = sorted({int(p[DEPTH.name]) for p in points}, reverse=True)
    speeds = any(decode_speed(p) is not None for p in points)
    panels: list[tuple[Panel, str]] = [("speed", "Against measured decode speed")] * speeds
    panels += [("flops", "Against counted FLOPs per token")]
    dark = depth_colours(depths, dark=True)
    names = colour_names(depths)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return template.render(
        sweep=sweep,
        ranking=ranking(sweep),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
        summary=summary(sweep),
        busy=busy_warning(sweep),
        light=LIGHT | {names[c]: c for c in names},
        dark=DARK | {names[c]: dark[d] for d, c in depth_colours(depths).items()},
        depths=[(d, names[depth_colours(depths)[d]]) for d in depths],
        top_ks=[
            (k, marker_size(k, model[str(TOP_K.size)]) / 2)
            for k in sorted({p[TOP_K.name] for p in points if p[TOP_K.name]}, reverse=True)
        ],
        shapes=[
            (PATHS[SHAPES[s]], SHAPE_NAMES[s])
            for s in SHAPES
            if s in {shape_of(p, sweep) for p in points}
        ],
        panels=[
            (
                title,
                inline_svg(frontier_figure(sweep, kind), kind, f"{title}: see the table", sweep),
            )
            for kind, title in panels
        ],
        curves=curve_sections(sweep),
        use=use_section(sweep),
        columns=COLUMNS,
        rows=[table_row(i, sweep, full) for i in by_cost(points)],
        threshold_measured=threshold_cost_is_measured(points, full) if full else None,
        data=public_copy(sweep),
    )


def colour_names(depths: Sequence[int]) -> dict[str, str]:
    """The CSS variable of each depth's colour, by the colour that the drawing uses."""
    return {colour: f"depth-{i}" for i, colour in enumerate(depth_colours(depths).values())}


def by_cost(points: Sequence[Point]) -> list[int]:
    """Indices of the points, the most expensive first; without a cost last."""
    return sorted(range(len(points)), key=lambda i: (-(flops(points[i]) or 0.0), i))


def summary(sweep: Sweep) -> str:
    """One sentence for the head of the page: the best saving, or why there is none."""
    points = sweep["points"]
    full = full_point(points)
    if full is None:
        return "The full network has not been measured yet, so there is nothing to compare with."
    if len(points) == 1:
        return (
            f"Only the full network has been measured: {full['bits_per_byte']:.3f} bits per byte "
            f"for {format_si(flops(full), 'FLOP')} per token."
        )
    found, trained = pick(points, full), bool(trained_points(points))
    note = "" if trained else " The checkpoint was not trained for smaller sub-networks."
    if found is None:
        return (
            f"No {'trained ' if trained else ''}sub-network of this sweep saves a quarter of the "
            f"full network's FLOPs and stays within 25 % of its {full['bits_per_byte']:.3f} bits "
            f"per byte.{note}"
        )
    speed = f" and decodes {found.speed:.2g} times as fast" if found.speed else ""
    change = f"{format_percent(abs(found.bits - 1), 1)} {'worse' if found.bits > 1 else 'better'}"
    return (
        f"{clean(found.point['name'], 30)} needs {format_percent(found.flops)} of the full "
        f"network's FLOPs per token{speed}; its bits per byte are {change} "
        f"({found.point['bits_per_byte']:.3f} against {full['bits_per_byte']:.3f}).{note}"
    )


def curve_sections(sweep: Sweep) -> list[tuple[str, str, Markup | None]]:
    """(title, the curve in words, drawing or None where the sweep has fewer than two points)."""
    sections: list[tuple[str, str, Markup | None]] = []
    members = curves(sweep["points"], full_values(sweep["model"]))
    for axis in TRAINED:
        on_axis = members[axis.name]
        if len(on_axis) < 2:
            sections.append((axis.title, "not varied alone in this sweep", None))
            continue
        words = "; ".join(
            f"{format_value(p[axis.name])}: {p['delta_nats']:+.3f}"
            f" ± {format_error(p['standard_error'], 2)}"
            for p in on_axis
            if p["name"] != "full"
        )
        words += " nats/token, ± 2 standard errors"
        caption = f"{axis.title} alone. {words}"
        svg = inline_svg(curve_figure(sweep, axis), axis.name, caption, sweep)
        sections.append((axis.title, words, svg))
    return sections


def use_section(sweep: Sweep) -> tuple[str, Markup] | None:
    """The heat map and its extremes in words; None where expert use was not recorded."""
    shares = [
        (use * len(row) / sum(row), layer, expert)
        for layer, row in zip(*use_layers(sweep), strict=True)
        if sum(row) > 0
        for expert, use in enumerate(row)
    ]
    if not shares:
        return None
    (least, *at_least), (most, *at_most) = min(shares), max(shares)
    starved = sum(share < 0.1 for share, *_ in shares)
    words = (
        f"The most used expert ({at_most[1]} of layer {at_most[0]}) gets {most:.1f} times an even "
        f"share, the least used ({at_least[1]} of layer {at_least[0]}) {least:.2f} times; "
        f"{starved} of {len(shares)} get less than a tenth of it."
    )
    return words, inline_svg(expert_use_figure(sweep), "use", words, sweep)


def table_row(index: int, sweep: Sweep, full: Point | None) -> Row:
    """The cells of one point, in the order of `COLUMNS`."""
    point = sweep["points"][index]
    untrained = untrained_axes(point, sweep["model"]) if not point.get("trained", True) else set()

    def number(key: str, form: str, tail: str = "", factor: float = 1) -> Cell:
        value = finite(point.get(key))
        return Cell("-", "") if value is None else Cell(f"{factor * value:{form}}{tail}", value)

    def si(key: str, unit: str = "") -> Cell:
        value = finite(point.get(key))
        return Cell(format_si(value, unit), "" if value is None else value)

    cost, base = flops(point), flops(full) if full else None
    share = cost / base if cost is not None and base else None
    delta = number("delta_nats", "+.3f")
    if point.get("standard_error") is not None and delta.key != "":
        delta = Cell(f"{delta.text} ± {format_error(point['standard_error'], 2)}", delta.key)
    speeds = []
    for kind in ("decode", "prefill"):
        speed, ends = finite(point.get(f"{kind}_tokens_per_second")), format_range(point, kind)
        text = format_speed(speed).removesuffix(" tok/s") + (f" ({ends})" if ends else "")
        speeds.append(Cell(text, "" if speed is None else speed))
    values = tuple(
        Cell(format_value(value), "" if value is None else float(value), key in untrained)
        for key, value in ((axis.name, point[axis.name]) for axis in TRAINED)
    )
    cells = (
        number("bits_per_byte", ".3f"),
        delta,
        si("flops_per_token"),
        Cell(format_percent(share), "" if share is None else share),
        *speeds,
        number("top1_agreement", ".1f", " %", 100),
        number("kl_to_full", ".4f"),
        number("perplexity", ",.2f"),
        *values,
        number("mean_experts", ".2f"),
        si("active_params"),
        si("active_params_max"),
        si("weight_bytes_per_token", "B"),
    )
    return Row(
        index,
        clean(point["name"]),
        bool(point.get("pareto")),
        bool(point.get("trained", True)),
        cells,
    )


def tooltip(point: Point) -> str:
    """A dot in words, for the mouse and for screen readers."""
    speed = decode_speed(point)
    return (
        f"{clean(point['name'])}: {point['bits_per_byte']:.3f} bits per byte, "
        f"{format_si(flops(point), 'FLOP')} per token"
        + (f", {format_speed(speed)} decode" if speed else "")
        + (f" ({ends})" if (ends := format_range(point, "decode")) else "")
        + ("" if point.get("trained", True) else ", not trained")
    )


def public_copy(sweep: Sweep) -> Any:
    """The sweep for embedding: without folders of its machine, NaN and infinities as null."""

    def plain(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    copy = plain(sweep)
    copy["model"].pop("path", None)
    copy.pop("command", None)
    return copy


def inline_svg(figure: Figure, prefix: str, label: str, sweep: Sweep) -> Markup:
    """A drawing fit to stand in a page beside others.

    Ids that something refers to get `prefix`, the others go; colours become CSS variables; `label`
    names the picture for screen readers; each dot carries its point's index and a tooltip. Working
    on the parsed tree, not on text: a label that looks like markup or a colour stays a label.
    """
    ET.register_namespace("", SVG)
    ET.register_namespace("xlink", XLINK)
    root = ET.fromstring(figure_to_svg(figure))
    points = sweep["points"]
    depths = [int(p[DEPTH.name]) for p in points]
    variables = {c: n for n, c in LIGHT.items()} | colour_names(depths)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == f"{{{SVG}}}metadata" or child.find(f"{{{SVG}}}style") is not None:
                parent.remove(child)  # the page has one rule for strokes, and names no other site
    referenced = {
        element.attrib[name].removeprefix("url(").strip("#)")
        for element in root.iter()
        for name in REFERENCES
        if name in element.attrib
    }
    for element in root.iter():
        attributes = element.attrib
        identity = attributes.get("id", "")
        if identity.startswith("point-"):
            index = int(identity.removeprefix("point-"))
            attributes["data-point"] = str(index)
            attributes["class"] = "dot"
            title = ET.Element(f"{{{SVG}}}title")
            title.text = tooltip(points[index])
            element.insert(0, title)
        if identity in referenced:
            attributes["id"] = f"{prefix}-{identity}"
        else:
            attributes.pop("id", None)
        for name in REFERENCES:
            if name in attributes:  # an embedded image's href is data, and has no #
                attributes[name] = attributes[name].replace("#", f"#{prefix}-", 1)
        if style := attributes.get("style"):
            style = re.sub(r" ?font-family: [^;]*;", "", style)
            attributes["style"] = re.sub(
                r"#[0-9a-f]{6}",
                lambda m: f"var(--{variables[m[0]]})" if m[0] in variables else m[0],
                style,
            )
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", label)
    text = ET.tostring(root, encoding="unicode")
    return Markup(text)
