"""A sweep end to end on a tiny model: files, figures, interruption, resumption."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest

from elastic_moe.cli.sweep import show
from elastic_moe.engine import Engine
from elastic_moe.errors import RoutingError
from elastic_moe.lab import load, sweep
from elastic_moe.lab.view.frontier import difference_error

FIELDS = set(
    """
    name depth top_k expert_width sparsity_threshold expert_pool active_params active_params_max
    flops_per_token weight_bytes_per_token mean_experts bits_per_byte perplexity standard_error
    kl_to_full top1_agreement prefill_tokens_per_second decode_tokens_per_second backend dtype
    pareto
    """.split()  # noqa: SIM905  (one word each reads better)
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "squares.txt"
    path.write_text(" ".join(f"{n} squared is {n * n}," for n in range(400)))
    return path


def quick(engine: Engine, text: Path, out: Path, **changes: object) -> dict:
    settings = {"depth": [2, 4, 6], "top_k": [1, 3], "text": text, "tokens": 1100, "quick": True}
    return sweep(engine, **{**settings, **changes}, out=out)


def test_a_sweep_writes_its_three_files_and_every_field(
    tiny: Engine, text: Path, tmp_path: Path
) -> None:
    steps: list[tuple[str, int, int]] = []
    result = quick(
        tiny, text, tmp_path, sparsity=[0.0, 0.7], progress=lambda *step: steps.append(step)
    )
    stored = json.loads((tmp_path / "sweep.json").read_text())
    assert stored == json.loads(json.dumps(result))
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert "</html>" in (tmp_path / "report.html").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "frontier.png",
        "report.html",
        "sweep.json",
    ]
    assert result["complete"] is True
    assert len(result["points"]) == 12
    for point in result["points"]:
        assert set(point) >= FIELDS
        assert None not in point.values()
        for kind in ("prefill", "decode"):
            key = f"{kind}_tokens_per_second"
            assert 0 < point[f"{key}_min"] <= point[key] <= point[f"{key}_max"]
        subnet = tiny.resolve(point["name"])
        assert point["active_params_max"] == subnet.active_params
        assert point["flops_per_token"] == pytest.approx(
            subnet.flops_per_token(512, point["mean_experts"]), rel=1e-3
        )
        thresholded = point["sparsity_threshold"] > 0 and point["top_k"] > 1
        assert (point["active_params"] < point["active_params_max"]) == thresholded
    full = next(p for p in result["points"] if p["name"] == "full")
    assert (full["kl_to_full"], full["top1_agreement"], full["delta_nats"]) == (0, 1, 0)
    assert full["standard_error"] == 0
    assert [step for step in steps if step[1] == step[2]][-1][0] == "speed"
    assert all(0 < done <= total for _, done, total in steps)


def test_an_interrupted_sweep_keeps_its_points_and_goes_on_from_there(
    tiny: Engine, text: Path, tmp_path: Path
) -> None:
    def interrupt(_: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quick(tiny, text, tmp_path, progress=interrupt)
    kept = json.loads((tmp_path / "sweep.json").read_text())
    assert kept["complete"] is False
    assert [p["name"] for p in kept["points"]] == ["full", "L2", "L4"]  # the first of two bundles
    assert (tmp_path / "report.html").exists()

    kept["points"][1]["bits_per_byte"] = 123.0  # a mark that only a kept point carries
    (tmp_path / "sweep.json").write_text(json.dumps(kept))
    result = quick(tiny, text, tmp_path)
    points = {p["name"]: p for p in result["points"]}
    assert result["complete"] is True
    assert list(points) == ["full", "L2-k1", "L2", "L4-k1", "L4", "k1"]
    assert points["L2"]["bits_per_byte"] == 123.0
    assert all(p["decode_tokens_per_second"] > 0 for p in points.values())

    again = quick(tiny, text, tmp_path, overwrite=True)  # a complete sweep is measured anew
    assert {p["name"]: p for p in again["points"]}["L2"]["bits_per_byte"] < 100


@pytest.mark.parametrize(
    ("axes", "names"),
    [
        ({"depth": [3]}, ["full", "L3"]),
        ({"top_k": [2]}, ["full", "k2"]),
        ({"expert_width": [2]}, ["full", "w2"]),
        ({"sparsity": [0.5]}, ["full", "t0.5"]),
        ({"expert_pool": [4]}, ["full", "p4"]),
        (
            {
                "depth": [3],
                "top_k": [2],
                "expert_width": [2],
                "sparsity": [0.5],
                "expert_pool": [4],
            },
            ["full", "L3-k2-w2-t0.5-p4"],
        ),
    ],
)
def test_every_axis_that_is_given_is_swept(
    tiny: Engine, text: Path, tmp_path: Path, axes: dict, names: list[str]
) -> None:
    none = {"depth": None, "top_k": None}
    result = quick(tiny, text, tmp_path, **{**none, **axes, "tokens": 512})
    assert [p["name"] for p in result["points"]] == names


def test_errors_of_differences_follow_from_the_deviations_of_the_windows(
    tiny: Engine, text: Path, tmp_path: Path
) -> None:
    full, *others = quick(tiny, text, tmp_path)["points"]
    windows = 1 + (1100 - 512) // 256
    for point in others:
        assert len(point["window_deviations"]) == windows
        assert abs(sum(point["window_deviations"])) < 1e-8
        assert point["standard_error"] > 0
        assert difference_error(point, full) == pytest.approx(point["standard_error"], abs=1e-8)


def test_what_ran_beside_a_sweep_is_recorded_and_a_busy_machine_is_reported(
    tiny: Engine,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for others, busy in ((0, False), (7, True)):
        monkeypatch.setattr(load, "count_other_threads", lambda others=others: others)
        out = tmp_path / str(others)
        result = quick(tiny, text, out)
        assert result["load"] == {
            "other_threads_mean": others,
            "other_threads_max": others,
            "busy": busy,
        }
        show(result, out)
        assert ("machine was busy" in " ".join(capsys.readouterr().out.split())) is busy
        assert ("The machine was busy: " in (out / "report.html").read_text()) is busy


def test_points_agree_with_their_definitions(tiny: Engine, text: Path, tmp_path: Path) -> None:
    for point in quick(tiny, text, tmp_path)["points"]:
        subnet = tiny.resolve(point["name"])
        assert point["perplexity"] == pytest.approx(math.exp(point["nats_per_token"]))
        assert point["weight_bytes_per_token"] == subnet.weight_bytes_per_token(4)  # float32
        assert point["flops_per_token_max"] == round(subnet.flops_per_token(512))


def test_a_bfloat16_weight_has_two_bytes(tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    engine = Engine.from_pretrained(tiny_folder, dtype="bfloat16")
    (full,) = quick(engine, text, tmp_path, depth=[6], top_k=None, tokens=512)["points"]
    assert full["weight_bytes_per_token"] == engine.resolve("full").weight_bytes_per_token(2)


def test_one_window_has_no_standard_error_and_everything_copes(
    tiny: Engine,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # every column fits, however fast the machine is
    result = quick(tiny, text, tmp_path, tokens=700, top_k=None)
    assert [p["standard_error"] for p in result["points"]] == [None] * 3
    report = (tmp_path / "report.html").read_text()
    assert "± 0.000" not in report
    assert "one window: no standard error" in report
    assert "± -" in report
    show(result, tmp_path)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert rows
    assert all(row[-4] == "-" for row in rows)


def test_points_that_were_not_timed_show_a_dash(
    tiny: Engine, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = quick(tiny, text, tmp_path)
    for point in result["points"][1:]:
        point["decode_tokens_per_second"] = None
    show(result, tmp_path)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert [row[-1] == "-" for row in rows] == [False] + [True] * (len(rows) - 1)


@pytest.mark.needs_torch
def test_channels_are_ranked_before_and_the_text_is_recorded(
    tiny_folder: Path, tiny: Engine, text: Path, tmp_path: Path
) -> None:
    def widths(out: Path, engine: Engine, **changes: object) -> dict:
        return quick(engine, text, out, depth=None, top_k=None, expert_width=[2], **changes)

    plain = widths(tmp_path / "plain", tiny)
    engine = Engine.from_pretrained(tiny_folder, dtype="float32")
    stages: list[str] = []
    ranked = widths(
        tmp_path / "ranked", engine, rank_channels=text, progress=lambda s, *_: stages.append(s)
    )
    assert stages[0] == "ranking"
    assert ranked["settings"]["rank_channels"] == "squares.txt"
    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    assert ranked["settings"]["rank_channels_sha256"] == digest
    (full, narrow), (plain_full, plain_narrow) = ranked["points"], plain["points"]
    assert full["bits_per_byte"] == pytest.approx(plain_full["bits_per_byte"], rel=1e-5)
    assert narrow["kl_to_full"] < 0.9 * plain_narrow["kl_to_full"]
    words = "channels of each expert ranked on squares.txt"
    assert words in (tmp_path / "ranked" / "report.html").read_text()
    assert "ranked on" not in (tmp_path / "plain" / "report.html").read_text()

    again = widths(tmp_path / "again", engine)  # an engine that was ranked before
    assert again["settings"]["rank_channels_sha256"] == digest
    assert f"a text of SHA-256 {digest[:12]}" in (tmp_path / "again" / "report.html").read_text()


def test_skipped_points_are_listed(tiny: Engine, text: Path, tmp_path: Path) -> None:
    result = quick(tiny, text, tmp_path, depth=None, top_k=[1, 3], expert_pool=[2])
    assert [p["name"] for p in result["points"]] == ["full", "k1-p2"]
    assert [s["name"] for s in result["skipped"]] == ["k3-p2"]


def test_values_out_of_range_are_refused_before_the_weights_are_read(
    tiny: Engine, tiny_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(RoutingError, match=r"depth must be an integer in \[1, 6\], got 9, 99\."):
        quick(tiny, text, out, depth=[3, 9, 99])
    monkeypatch.setattr(Engine, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(RoutingError, match="got 9"):
        sweep(tiny_folder, depth=[9], out=out)
    assert not out.exists()
