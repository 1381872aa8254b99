"""The page: complete, escaped, self-contained, and without an error in a real browser."""

from __future__ import annotations

import html.parser
import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from elastic_moe.lab.view.report import COLUMNS, render_report, summary, write_report
from elastic_moe.routing.axes import TRAINED
from tests.lab.view.synthetic import synthetic_sweep

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
VOID = {"meta", "link", "input", "br", "img", "hr"}


class Page(html.parser.HTMLParser):
    """Collects the tags with their attributes, and fails on tags closed in the wrong order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page() -> str:
    """The report of the complete synthetic sweep."""
    return render_report(synthetic_sweep())


def embedded(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page)[1])


def svgs(page: str) -> list[str]:
    return re.findall(r'<svg xmlns="http://www.w3.org/2000/svg".*?</svg>', page, re.DOTALL)


def without_namespaces(page: str) -> str:
    return re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)


def test_nothing_comes_from_outside(page):
    text = without_namespaces(page)
    assert not re.search(r"https?:|@import|//[\w-]+\.\w", text.replace("// Sorting", ""))
    for tag, attributes in Page(page).tags:
        for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)
    for target in re.findall(r"url\(([^)]*)\)", text):
        assert target.startswith("#")
    assert "default-src 'none'" in page


def test_ids_are_unique_and_every_reference_has_its_target(page):
    tags = Page(page).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = re.findall(r"url\(#([^)]*)\)", page)
    for _, attributes in tags:
        if (attributes.get("xlink:href") or "").startswith("#"):
            references.append(attributes["xlink:href"][1:])
        references += (attributes.get("aria-labelledby") or "").split()
    assert references
    assert set(references) <= set(ids)


def test_every_drawing_has_a_name_and_is_well_formed(page):
    drawings = [ET.fromstring(text) for text in svgs(page)]
    points = synthetic_sweep()["points"]
    swept = [axis for axis in TRAINED if len({point[axis.name] for point in points}) > 1]
    assert len(swept) >= 5
    assert len(drawings) == 2 + len(swept) + 1
    for drawing in drawings:
        assert drawing.get("role") == "img"
        assert drawing.get("aria-label")


def test_every_colour_has_a_dark_counterpart(page):
    used = set(re.findall(r"var\(--([\w-]+)\)", page))
    light, dark = re.findall(r":root \{(.*?)\}", page)
    for block in (light, dark):
        assert used <= set(re.findall(r"--([\w-]+):", block))
    # What is drawn in a fixed colour would vanish on one of the pages.
    for drawing in svgs(page)[:-1]:
        assert not re.search(r"(fill|stroke): #", drawing)


def test_the_table_holds_every_point(page):
    sweep = synthetic_sweep()
    parsed = Page(page)
    rows = [
        attributes for tag, attributes in parsed.tags if tag == "tr" and "data-point" in attributes
    ]
    assert sorted(int(r["data-point"]) for r in rows) == list(range(len(sweep["points"])))
    for row in rows:
        point = sweep["points"][int(row["data-point"])]
        assert row["data-name"] == point["name"]
        assert ("data-pareto" in row) is point["pareto"]
        assert ("data-untrained" in row) is not point["trained"]
    scopes = [attributes.get("scope") for tag, attributes in parsed.tags if tag == "th"]
    assert scopes.count("col") == len(COLUMNS) + 2
    assert None not in scopes
    assert page.count("value not trained") == sum(not p["trained"] for p in sweep["points"])


def test_what_was_measured_is_said(page):
    sweep = synthetic_sweep()
    corpus = sweep["corpus"]
    for fact in (
        corpus["sha256"],
        corpus["name"],
        f"{corpus['scored_tokens']:,}",
        f"{corpus['scored_bytes']:,}",
        "Windows of 512 tokens every 256",
        corpus["bos"],
        "bfloat16",
        "AMD EPYC",
        "torch 2.13.0",
        "top_k must be in [1, 2], got 4",
        "upper bound",
        "paired",
        "the experts that ran",
    ):
        assert fact in page, fact
    assert "Partial run" not in page


def test_the_summary_names_a_measured_point():
    sweep = synthetic_sweep()
    text = summary(sweep)
    name, percent = re.match(r"(\S+) needs (\d+) % of the full network's FLOPs", text).groups()
    point = next(p for p in sweep["points"] if p["name"] == name)
    full = sweep["points"][0]
    assert float(percent) == pytest.approx(
        100 * point["flops_per_token"] / full["flops_per_token"], abs=0.5
    )
    assert f"{point['bits_per_byte']:.3f} against {full['bits_per_byte']:.3f}" in text


@pytest.mark.parametrize(("first", "count"), [(0, 0), (0, 1), (1, 3)])
def test_a_partial_sweep_says_so(count, first):
    sweep = synthetic_sweep(timings=False, complete=False)
    sweep["points"] = sweep["points"][first : first + count]
    sweep["expert_use"] = None
    sweep["skipped"] = []
    sweep["model"]["elastic_moe"] = None
    text = render_report(sweep)
    Page(text)
    assert "Partial run" in text
    assert "Speed was not measured" in text


def test_a_point_without_one_value_per_axis_has_dashes():
    sweep = synthetic_sweep()
    axes = dict.fromkeys(("top_k", "expert_width", "sparsity_threshold", "expert_pool"))
    sweep["points"][3] |= axes | {"name": "L1", "depth": 1, "trained": False}
    row = re.search(r'<tr data-point="3".*?</tr>', render_report(sweep))[0]
    assert row.count(">-<") == 4


def test_numbers_that_json_lacks_become_null():
    sweep = synthetic_sweep()
    sweep["points"][3]["perplexity"] = math.inf
    sweep["points"][4]["decode_tokens_per_second"] = math.nan
    sweep["points"][5]["prefill_tokens_per_second"] = None
    text = render_report(sweep)
    assert embedded(text)["points"][3]["perplexity"] is None
    assert embedded(text)["points"][4]["decode_tokens_per_second"] is None
    cells = re.findall(r"<td[^>]*>([^<]*)", text)
    assert not {"inf", "nan", "None"} & set(cells)


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"&{{7*7}}#1c2127"


def test_hostile_text_stays_text():
    sweep = synthetic_sweep()
    clean_tags = [tag for tag, _ in Page(render_report(sweep)).tags]
    sweep["model"]["name"] = sweep["model"]["model_type"] = HOSTILE
    sweep["corpus"] |= {"name": HOSTILE, "bos": HOSTILE, "sha256": HOSTILE}
    sweep["machine"] = {HOSTILE: HOSTILE}
    sweep["versions"] = {HOSTILE: HOSTILE}
    sweep["settings"] = {HOSTILE: [HOSTILE]}
    sweep["skipped"] = [{"name": HOSTILE, "reason": HOSTILE}]
    for point in sweep["points"]:
        point["backend"] = point["dtype"] = HOSTILE
        if point["name"] != "full":
            point["name"] = HOSTILE[: 60 + len(point["name"])] + point["name"]
    text = render_report(sweep)
    parsed = Page(text)
    tags = [tag for tag, _ in parsed.tags]
    # The same page, but for leader lines and labels, which depend on the names' lengths.
    assert set(tags) == set(clean_tags)
    for tag in ("script", "img", "tr", "td", "figure", "style"):
        assert tags.count(tag) == clean_tags.count(tag), tag
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    assert embedded(text)["model"]["name"] == HOSTILE
    assert "49" not in re.findall(r"<h1>(.*?)</h1>", text)[0]
    labels = [t.text for s in svgs(text) for t in ET.fromstring(s).iter() if t.tag.endswith("text")]
    assert any("<script>" in (label or "") for label in labels)


def test_a_colour_in_a_name_is_not_replaced():
    sweep = synthetic_sweep()
    sweep["points"][1]["name"] = "#1c2127"
    sweep["points"][1]["pareto"] = True
    assert any("#1c2127" in drawing for drawing in svgs(render_report(sweep)))


def test_the_models_folder_is_not_published(page):
    assert "path" not in embedded(page)["model"]
    assert "elastic_moe/bundled" not in page
    sweep = synthetic_sweep() | {"command": "elastic-moe sweep --out /home/me"}
    assert "/home/me" not in render_report(sweep)


def test_equal_sweeps_give_equal_bytes(tmp_path, page):
    write_report(synthetic_sweep(), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text("utf-8") == page
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def browse(path: Path, profile: Path) -> tuple[str, list[str]]:
    """Open a page in headless Chromium: its document after the scripts, its console's lines."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={profile}",
            "--enable-logging=stderr",
            "--v=0",
            "--virtual-time-budget=2000",
            "--dump-dom",
            path.resolve().as_uri(),
        ],
        capture_output=True,
        timeout=120,
        check=True,
        encoding="utf-8",
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


needs_chromium = pytest.mark.skipif(
    CHROMIUM is None,
    reason="Chromium is not installed (Debian: apt-get install chromium): "
    "that the report opens without a console error was NOT checked",
)


@needs_chromium
def test_the_report_opens_in_chromium_without_a_console_line(tmp_path, page):
    (tmp_path / "report.html").write_text(page, "utf-8")
    document, console = browse(tmp_path / "report.html", tmp_path / "profile")
    assert console == []
    assert 'class="js"' in document  # the script's last line ran
    assert "26 of 26 shown" in document


@needs_chromium
def test_a_hostile_report_runs_nothing_in_chromium(tmp_path):
    sweep = synthetic_sweep()
    sweep["model"]["name"] = sweep["corpus"]["name"] = HOSTILE
    sweep["points"][1]["name"] = HOSTILE
    write_report(sweep, tmp_path / "report.html")
    document, console = browse(tmp_path / "report.html", tmp_path / "profile")
    assert console == []
    assert 'class="js"' in document
    assert "<img" not in document


@needs_chromium
@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("throws", "<script>", "<script>throw new Error('on purpose')</script><script>"),
        ("loads-from-outside", "<main>", '<main><img src="https://example.invalid/x.png">'),
    ],
)
def test_the_browser_check_can_fail(tmp_path, page, name, old, new):
    broken = page.replace(old, new, 1)
    if name == "throws":  # without the policy, which would stop the script before it throws
        broken = re.sub(r"<meta http-equiv[^>]*>", "", broken)
    (tmp_path / "report.html").write_text(broken, "utf-8")
    _, console = browse(tmp_path / "report.html", tmp_path / "profile")
    assert any(word in line for line in console for word in ("on purpose", "Content Security"))
