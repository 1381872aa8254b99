"""Tables leave out columns that do not fit, and never a digit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from elastic_moe.cli.sweep import show
from elastic_moe.cli.tables import Column, make_console, print_table
from elastic_moe.lab.view.frontier import mark_pareto
from tests.lab.view.synthetic import synthetic_sweep

COLUMNS = [
    Column("name", ["full", "L24-k2"], 0),
    Column("first", ["1.000", "0.500"], 1),
    Column("second", ["12,345.6", "9.0"], 3),
    Column("third", ["7", "8"], 2),
]


@pytest.mark.parametrize(
    ("width", "headings", "left_out"),
    [
        (60, ["name", "first", "second", "third"], ""),
        (25, ["name", "second", "third"], "first"),
        (17, ["name", "second"], "first, third"),
        (8, ["name"], "first, second, third"),
    ],
)
def test_the_columns_that_matter_least_go_first(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    width: int,
    headings: list[str],
    left_out: str,
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    print_table(make_console(), COLUMNS, box=None)
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].split() == headings
    shown = [column for column in COLUMNS if column.heading in headings]
    assert [line.split() for line in lines[1:3]] == [[c.cells[i] for c in shown] for i in (0, 1)]
    note = f"left out, for {width} columns: {left_out}" if left_out else ""
    assert " ".join(out.split("\n", 3)[3].split()) == note


def test_a_pipe_has_a_hundred_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert make_console().width == 100


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_the_frontier_fits_with_every_digit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    result = synthetic_sweep()
    for point in result["points"]:
        speed = point["decode_tokens_per_second"]
        point["decode_tokens_per_second_min"] = 0.9 * speed
        point["decode_tokens_per_second_max"] = 1.1 * speed
    mark_pareto(result["points"])
    monkeypatch.setenv("COLUMNS", str(width))
    show(result, Path("out"))
    table = capsys.readouterr().out.split("params, FLOP:")[0]
    assert max(map(len, table.splitlines())) <= width
    assert "…" not in table
    full = result["points"][0]
    speed = full["decode_tokens_per_second"]
    assert f"{full['bits_per_byte']:.3f}" in table
    assert f" {speed:.1f} " in table
    assert (f" {0.9 * speed:.1f}-{1.1 * speed:.1f} " in table) is (width >= 80)


def test_the_committed_sweep_has_all_its_columns_in_eighty(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).resolve().parents[2]
    path = root / "benchmarks" / "results" / "sweep-elastic-mini.json"
    monkeypatch.setenv("COLUMNS", "80")
    show(json.loads(path.read_text(encoding="utf-8")), Path("sweep-out"))
    assert "left out" not in capsys.readouterr().out
