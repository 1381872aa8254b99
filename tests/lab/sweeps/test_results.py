"""Finished points survive whatever is run next in their folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from elastic_moe_kernels.arrays import has_torch

from elastic_moe.engine import Engine
from elastic_moe.errors import ElasticMoEError, ResultExistsError
from elastic_moe.lab import sweep
from elastic_moe.lab.schema import ADDED_FIELDS, POINT_FIELDS
from elastic_moe.lab.sweeps import results

MARK = 123.0  # a quality that only a kept point carries


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "squares.txt"
    path.write_text(" ".join(f"{n} squared is {n * n}," for n in range(300)))
    return path


def quick(engine: Engine, text: Path, out: Path, **changes: Any) -> dict[str, Any]:
    settings = {"depth": [2, 6], "text": text, "tokens": 600, "quick": True}
    return sweep(engine, **{**settings, **changes}, out=out)


@pytest.fixture(scope="module")
def finished(tiny: Engine, text: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The sweep.json of the grid full, L2."""
    out = tmp_path_factory.mktemp("finished")
    quick(tiny, text, out)
    return (out / "sweep.json").read_text()


def leave(
    out: Path, finished: str, change: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Put an earlier sweep into `out`, stopped, its L2 marked, and otherwise changed."""
    earlier: dict[str, Any] = json.loads(finished)
    earlier["complete"] = False
    earlier["points"][1]["bits_per_byte"] = MARK
    change(earlier)
    (out / "sweep.json").write_text(json.dumps(earlier))
    return earlier


def stop_at_once(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_stopped_sweep_is_continued_and_keeps_points_outside_the_new_grid(
    tiny: Engine, text: Path, tmp_path: Path, finished: str
) -> None:
    leave(tmp_path, finished)
    lines: list[str] = []
    result = quick(tiny, text, tmp_path, depth=[4, 6], notify=lines.append)
    points = {point["name"]: point for point in result["points"]}
    assert list(points) == ["full", "L4", "L2"]
    assert points["L2"]["bits_per_byte"] == MARK
    assert points["L4"]["decode_tokens_per_second"] > 0
    assert result["complete"] is True
    assert "2 sub-networks are kept, 1 of them outside this grid" in lines[0]
    assert len(lines) == 1
    assert not (tmp_path / "sweep.previous.json").exists()


def _in(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(earlier: dict[str, Any]) -> None:
        for key in path[:-1]:
            earlier = earlier[key]
        assert earlier[path[-1]] != value
        earlier[path[-1]] = value

    return change


# Every setting that a point depends on; the fixture's sweep has all of them.
SETTINGS = [
    ("schema_version",),
    ("corpus", "sha256"),
    ("corpus", "scored_tokens"),
    ("settings", "weights_sha256"),
    ("settings", "config_sha256"),
    ("settings", "tokenizer_sha256"),
    ("settings", "backend"),
    ("settings", "dtype"),
    ("settings", "device"),
    ("settings", "rank_channels_sha256"),
    ("settings", "quick"),
    ("machine", "threads"),
    *([("versions", "torch")] if has_torch() else []),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=".".join)
def test_a_sweep_with_another_setting_is_kept_aside_and_the_setting_is_named(
    tiny: Engine, text: Path, tmp_path: Path, finished: str, setting: tuple[str, ...]
) -> None:
    earlier = leave(tmp_path, finished, _in(*setting, value=77))
    lines: list[str] = []
    with pytest.raises(ResultExistsError) as refused:
        quick(tiny, text, tmp_path, depth=[6])
    assert f"{'.'.join(setting)} was 77, is " in str(refused.value)
    assert json.loads((tmp_path / "sweep.json").read_text()) == earlier
    result = quick(tiny, text, tmp_path, depth=[6], notify=lines.append, overwrite=True)
    assert all(point["bits_per_byte"] < 100 for point in result["points"])
    assert json.loads((tmp_path / "sweep.previous.json").read_text()) == earlier
    stored = json.loads((tmp_path / "sweep.json").read_text())
    assert [point["name"] for point in stored["points"]] == ["full"]
    (line,) = lines
    assert f"{'.'.join(setting)} was 77, is " in line
    assert "kept as sweep.previous.json" in line


def test_a_sweep_of_an_earlier_version_is_continued(
    tiny: Engine, text: Path, tmp_path: Path, finished: str
) -> None:
    """It wrote neither date nor command, less of the machine, and no spread."""

    def as_before(earlier: dict[str, Any]) -> None:
        for key in ("date", "command", "commit"):
            del earlier[key]
        for key in ("cpu_vendor", "cpu_family", "cpu_model", "cpu_stepping"):
            del earlier["machine"][key]
        del earlier["load"]
        for point in earlier["points"]:
            for key in ADDED_FIELDS:
                del point[key]

    leave(tmp_path, finished, as_before)
    result = quick(tiny, text, tmp_path, depth=[2, 6])
    assert [point["bits_per_byte"] for point in result["points"]][1] == MARK
    assert not (tmp_path / "sweep.previous.json").exists()
    assert result["date"].endswith("+00:00")


def test_the_settings_hold_what_a_point_depends_on(finished: str) -> None:
    sweep = json.loads(finished)
    for key, *rest in SETTINGS:
        assert not rest or rest[0] in sweep[key]
    hashes = [value for key, value in sweep["settings"].items() if key.endswith("_sha256")]
    assert [len(value) for value in hashes if value] == [64] * 3
    assert len(set(hashes)) == 4  # one of them None: nothing was ranked
    assert sweep["settings"]["device"] == "cpu"


@pytest.mark.parametrize("complete", [True, False])
def test_an_interruption_before_the_first_point_leaves_the_folder_as_it_was(
    tiny: Engine, text: Path, tmp_path: Path, finished: str, complete: bool
) -> None:
    leave(tmp_path, finished, lambda earlier: earlier.update(complete=complete))
    before = json.loads((tmp_path / "sweep.json").read_text())
    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        quick(
            tiny,
            text,
            tmp_path,
            depth=[3],
            progress=stop_at_once,
            notify=lines.append,
            overwrite=complete,
        )
    after = json.loads((tmp_path / "sweep.json").read_text())
    assert after["points"] == before["points"]
    assert not (tmp_path / "sweep.previous.json").exists()
    if complete:
        assert "it is complete" in lines[0]
        assert "No sub-network was finished" in lines[1]
    else:
        assert "holds the 2 sub-networks that are done" in lines[1]


@pytest.mark.parametrize(
    ("grid", "difference"),
    [
        ([6], "it also has L2"),
        ([1, 2, 3, 4, 5], "it lacks L1, L3, L4 and 1 more"),
        ([3], "it lacks L3 and it also has L2"),
    ],
)
def test_the_finished_result_of_another_grid_is_not_replaced_unasked(
    tiny: Engine, text: Path, tmp_path: Path, finished: str, grid: list[int], difference: str
) -> None:
    earlier = leave(tmp_path, finished, lambda earlier: earlier.update(complete=True))
    with pytest.raises(ResultExistsError, match=f"another sweep: {difference}. Nothing was") as e:
        quick(tiny, text, tmp_path, depth=grid, progress=stop_at_once)
    assert "--out" in str(e.value)
    assert "--overwrite" in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ["sweep.json"]
    assert json.loads((tmp_path / "sweep.json").read_text()) == earlier
    result = quick(tiny, text, tmp_path, depth=grid, overwrite=True)
    assert len(result["points"]) == 1 + len(set(grid) - {6})
    assert json.loads((tmp_path / "sweep.previous.json").read_text()) == earlier


def test_the_same_sweep_again_returns_the_result_that_is_there(
    tiny: Engine, text: Path, tmp_path: Path, finished: str
) -> None:
    earlier = leave(tmp_path, finished, lambda earlier: earlier.update(complete=True))
    lines: list[str] = []
    result = quick(tiny, text, tmp_path, progress=stop_at_once, notify=lines.append)
    assert result == earlier
    (line,) = lines
    assert "nothing was measured. --overwrite measures again." in line
    assert [p.name for p in tmp_path.iterdir()] == ["sweep.json"]
    assert json.loads((tmp_path / "sweep.json").read_text()) == earlier


def test_a_continued_sweep_that_kept_points_outside_its_grid_is_the_same_when_repeated(
    tiny: Engine, text: Path, tmp_path: Path, finished: str
) -> None:
    leave(tmp_path, finished, lambda e: e["points"][1].update(decode_tokens_per_second=None))
    result = quick(tiny, text, tmp_path, depth=[4])
    assert [point["name"] for point in result["points"]] == ["full", "L4", "L2"]
    assert quick(tiny, text, tmp_path, depth=[4], progress=stop_at_once) == result


def test_an_interruption_in_an_empty_folder_writes_no_empty_result(
    tiny: Engine, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        quick(tiny, text, tmp_path, progress=stop_at_once)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", ""),
        ("\xff", ""),
        ("[]", "must hold a JSON object, got list"),
        ("{}", "it lacks schema_version, corpus, settings"),
        ("null", "got NoneType"),
    ],
)
def test_what_is_no_sweep_is_named_and_left_alone(
    tiny: Engine, text: Path, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "sweep.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ElasticMoEError, match=rf"sweep\.json is no .*{message}.*Move it away"):
        quick(tiny, text, tmp_path)
    assert (tmp_path / "sweep.json").read_bytes() == content.encode("latin-1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda earlier: earlier.pop("points"), "it lacks points"),
        (lambda earlier: earlier.update(points={}), "points must be a list of objects"),
        (lambda earlier: earlier.update(points=[3]), "points must be a list of objects"),
        (lambda earlier: earlier["points"][1].pop("name"), r"points\[1\] lacks name"),
        (lambda earlier: earlier["points"][0].pop("kl_to_full"), r"points\[0\] lacks kl_to_full"),
    ],
)
def test_a_sweep_that_lacks_parts_is_named(
    tiny: Engine, text: Path, tmp_path: Path, finished: str, change: Any, message: str
) -> None:
    leave(tmp_path, finished, change)
    with pytest.raises(ElasticMoEError, match=message):
        quick(tiny, text, tmp_path)


def test_the_fields_of_a_point_are_those_that_are_checked(finished: str) -> None:
    for point in json.loads(finished)["points"]:
        assert set(point) == set(POINT_FIELDS)


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_read(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    for out in (file, file / "below"):
        with pytest.raises(ElasticMoEError, match=f"--out {out}: the results cannot be written"):
            sweep("no/such/model", text=text, out=out)

    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(results.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ElasticMoEError, match=r"Permission denied\. Name a folder"):
        sweep("no/such/model", text=text, out=tmp_path / "new")
