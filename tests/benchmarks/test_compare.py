"""Two runs of the kernel benchmarks: what counts as a regression, and with which status it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.kernels.compare import compare, main


def write(path: Path, medians: dict[str, float], limit: float | None = 0.5) -> str:
    entries = [
        {
            "fullname": name,
            "stats": {"median": median},
            "extra_info": {} if limit is None else {"limit_seconds": limit},
        }
        for name, median in medians.items()
    ]
    path.write_text(json.dumps({"benchmarks": entries}))
    return str(path)


@pytest.mark.parametrize(
    ("ratio", "status"), [(0.5, 0), (1.0, 0), (1.09, 0), (1.11, 1), (2.0, 1), (float("inf"), 1)]
)
def test_what_takes_longer_than_the_tolerance_is_a_regression(
    tmp_path: Path, ratio: float, status: int
) -> None:
    old = write(tmp_path / "old.json", {"a": 2.0, "b": 1.0})
    new = write(tmp_path / "new.json", {"a": 2.0 * ratio, "b": 1.0})
    assert main([old, new]) == status
    assert main([old, new, "--tolerance", "3"]) == (1 if ratio > 4 else 0)


def test_every_benchmark_is_told_worst_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = write(tmp_path / "old.json", {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0, "e": 1.0})
    new = write(tmp_path / "new.json", {"a": 1.5, "b": 3.0, "c": 0.5, "d": 1.01, "f": 1.0})
    assert main([old, new]) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[:3] == [
        ["SLOWER", "3.00x", "b"],
        ["SLOWER", "1.50x", "a"],
        ["faster", "0.50x", "c"],
    ]
    assert lines[3:5] == [["GONE", "e"], ["new", "f"]]
    assert " ".join(lines[5]) == "2 slower by more than 10%, 1 faster, 1 the same, 1 gone, 1 new"


def test_a_benchmark_that_is_gone_does_not_pass() -> None:
    assert not compare({"a": 1.0}, {}, 0.1).passed
    assert compare({}, {"a": 1.0}, 0.1).passed


def test_shares_take_the_drift_of_the_machine_out(tmp_path: Path) -> None:
    old = write(tmp_path / "old.json", {"a": 1.0}, limit=0.5)
    new = write(tmp_path / "new.json", {"a": 2.0}, limit=1.0)
    assert main([old, new]) == 1
    assert main([old, new, "--share"]) == 0


def test_what_is_no_run_is_a_bad_argument(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write(tmp_path / "good.json", {"a": 1.0}, limit=None)
    bad = tmp_path / "bad.json"
    bad.write_text("[]")
    assert main([good, str(bad)]) == 2
    assert "it has no list 'benchmarks'" in capsys.readouterr().err
    assert main([good, str(tmp_path / "none.json")]) == 2
    assert main([good, good, "--share"]) == 2
    assert "has no limit_seconds" in capsys.readouterr().err
    with pytest.raises(SystemExit) as done:
        main([good, good, "--tolerance", "nan"])
    assert done.value.code == 2
