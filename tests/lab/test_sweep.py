"""A sweep end to end on a tiny model: files, figures, interruption, resumption."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from elastic_moe.engine import Engine
from elastic_moe.errors import ElasticMoEError
from elastic_moe.lab import sweep

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

    again = quick(tiny, text, tmp_path)  # a complete sweep is measured anew
    assert {p["name"]: p for p in again["points"]}["L2"]["bits_per_byte"] < 100


def test_an_interrupted_sweep_of_another_text_is_not_continued(
    tiny: Engine, text: Path, tmp_path: Path
) -> None:
    quick(tiny, text, tmp_path)
    kept = json.loads((tmp_path / "sweep.json").read_text())
    kept["complete"] = False
    kept["points"][1]["bits_per_byte"] = 123.0
    kept["corpus"]["sha256"] = "0" * 64
    (tmp_path / "sweep.json").write_text(json.dumps(kept))
    result = quick(tiny, text, tmp_path)
    assert all(p["bits_per_byte"] < 100 for p in result["points"])


def test_a_damaged_result_is_named_and_left_alone(tiny: Engine, text: Path, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(ElasticMoEError, match=r"sweep\.json is no JSON"):
        quick(tiny, text, tmp_path)
    assert (tmp_path / "sweep.json").read_text() == "{"


def test_skipped_points_are_listed(tiny: Engine, text: Path, tmp_path: Path) -> None:
    result = quick(tiny, text, tmp_path, depth=[3, 9], top_k=None)
    assert [p["name"] for p in result["points"]] == ["full", "L3"]
    assert [s["name"] for s in result["skipped"]] == ["L9"]
