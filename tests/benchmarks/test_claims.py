"""The page of claims is what the committed results say, and nothing of it is typed in."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import claims
from benchmarks.claims import CLAIMS, NOT_YET, PAGE, RESULTS, TEXT, Results, main, nothing, page

FILES = ("elastic-mini.jsonl", "peers.jsonl", "sweep-elastic-mini.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The committed results without those of the science."""
    for name in FILES:
        shutil.copy(RESULTS / name, tmp_path)
    return tmp_path


def rows(text: str) -> list[list[str]]:
    """The cells of the table, without its header."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines[1:]]


def over_seeds(mean: float, sd: float | None = 0.01, n: int = 3) -> dict[str, Any]:
    return {"n": n, "mean": mean, "sd": sd}


def summary() -> dict[str, Any]:
    """The last line of a science.jsonl, whose every mean is another number."""
    points = {}
    for index, name in enumerate(("full", "k2", "k1", "L9", "L6", "p8", "w4")):
        points[name] = {
            "lost": {
                "elastic": over_seeds(1 + index / 100),
                "inelastic": over_seeds(2 + index / 100),
            },
            "elastic_gain": over_seeds(3 + index / 100),
            "specialist_gain": over_seeds(4 + index / 100, None, 1),
        }
    texts = {TEXT: {"points": points}}
    return {"kind": "summary", "case": "summary", "tokens": 9_998_336, "texts": texts}


def write_science(folder: Path, line: dict[str, Any]) -> None:
    lines = [{"kind": "run", "case": "elastic-0"}, line]
    (folder / "science.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in lines))


def test_the_committed_page_is_what_the_results_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(Results())


def test_check_finds_a_page_that_is_out_of_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(claims, "PAGE", tmp_path / "CLAIMS.md")
    monkeypatch.setattr(sys, "argv", ["claims", "--check"])
    assert main() == 1
    monkeypatch.setattr(sys, "argv", ["claims"])
    assert main() == 0
    monkeypatch.setattr(sys, "argv", ["claims", "--check"])
    assert main() == 0
    (tmp_path / "CLAIMS.md").write_text("old")
    assert main() == 1
    assert "is out of date" in capsys.readouterr().out


def test_every_row_has_a_source_and_says_what_cannot_be_had_here() -> None:
    for claim in CLAIMS:
        assert re.search(r"\[.+\]\(https://.+\)", claim.source)
        assert "|" not in claim.published + claim.reading
        if claim.measured is nothing:
            assert "not reproducible here" in claim.reading
    assert all(len(cells) == 4 for cells in rows(page(Results())))
    cited = " ".join(claim.source for claim in CLAIMS)
    for number in ("2602.04705", "2310.07707", "2602.06154", "2402.14800", "1903.05134"):
        assert number in cited


def test_what_is_not_measured_yet_says_so(folder: Path) -> None:
    text = page(Results(folder))
    assert f"single sub-networks: {NOT_YET}" in text
    measured = {cells[1]: cells[2] for cells in rows(text)}
    with_science = [what for what, cell in measured.items() if NOT_YET in cell]
    assert len(with_science) == 7
    assert any("depth 16 -> 12" in what for what in with_science)


def test_every_figure_of_the_science_has_its_place(folder: Path) -> None:
    write_science(folder, summary())
    text = page(Results(folder))
    assert NOT_YET not in text
    assert "single sub-networks: 10.0 M tokens each" in text
    for figure in (
        "12 layers `k2`: +1.010 ± 0.010 (3 seeds); inelastic: +2.010 ± 0.010 (3 seeds)",
        "12 layers `k1`: +1.020",
        "12 layers `L9`: +1.030",
        "12 layers `p8`: +1.050",
        "whole network: -3.000 ± 0.010 (3 seeds)",  # a gain of 3 is a cost of -3
        "half the width -3.060",
        "`L9` +4.030 (1 seed)",
        "`p8` +4.050 (1 seed)",
    ):
        assert figure in text, figure


def test_what_the_science_has_not_finished_is_not_measured_yet(folder: Path) -> None:
    line = summary()
    points = line["texts"][TEXT]["points"]
    points["k2"]["lost"] = {"elastic": None, "inelastic": None}
    points["L9"]["lost"]["inelastic"] = None
    points["p8"]["specialist_gain"] = None
    points["full"]["elastic_gain"] = over_seeds(0.0, None, 0)
    write_science(folder, line)
    text = page(Results(folder))
    assert f"12 layers `k2`: {NOT_YET} |" in text
    assert f"12 layers `L9`: +1.030 ± 0.010 (3 seeds); inelastic: {NOT_YET} |" in text
    assert f"`p8` {NOT_YET}" in text
    assert f"whole network: {NOT_YET}" in text


def change_quality(folder: Path) -> None:
    path = folder / "elastic-mini.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["points"]["k2"] |= {"nats_lost": 0.7654, "standard_error": 0.0321}
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def change_sweep(folder: Path) -> None:
    path = folder / "sweep-elastic-mini.json"
    sweep = json.loads(path.read_text())
    for point in sweep["points"]:
        point |= {"mean_experts": 1.25, "delta_nats": 0.5, "standard_error": 0.25}
    path.write_text(json.dumps(sweep))


def change_peers(folder: Path) -> None:
    path = folder / "peers.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        for one in line["rounds"]:
            one["other"] |= {"full seconds": 3.0, "k2 seconds": 2.0}
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


@pytest.mark.parametrize(
    ("change", "figure", "changed"),
    [
        (change_quality, "elastic-mini `k2`: +0.765 ± 0.032", 1),
        (change_sweep, "1.25 of 1 experts run, 95 % of the FLOPs, +0.500 ± 0.250", 1),
        (change_peers, "k 8 -> 2 decodes 50 % faster", 1),
    ],
)
def test_what_was_measured_comes_from_the_results(
    change: Callable[[Path], None], figure: str, changed: int, folder: Path
) -> None:
    before = rows(page(Results(folder)))
    change(folder)
    text = page(Results(folder))
    assert figure in text
    assert sum(a != b for a, b in zip(before, rows(text), strict=True)) == changed
