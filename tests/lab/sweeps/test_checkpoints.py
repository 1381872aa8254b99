"""Sweeps of checkpoints that were not trained elastically; some layers are dense."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.cli.sweep import show
from elastic_moe.engine import Engine
from elastic_moe.lab import sweep
from elastic_moe.lab.view.report import summary
from elastic_moe.lab.view.report_plots import expert_use_figure
from elastic_moe.model.checkpoints.folder import BUNDLED
from tests.model.transformers_models import their_model

WORDS = " ".join(f"{n} squared is {n * n}," for n in range(300))


@pytest.fixture(scope="module", params=["olmoe", "ernie4_5_moe"])
def swept(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Any], Path]:
    """(architecture, result of the default grid, its folder)."""
    folder = tmp_path_factory.mktemp("checkpoints") / request.param
    model = their_model(request.param, vocab_size=4096, max_position_embeddings=640)
    model.save_pretrained(folder)
    shutil.copy(BUNDLED / "elastic-mini" / "tokenizer.json", folder)
    text = folder.parent / "squares.txt"
    text.write_text(WORDS)
    out = folder.parent / "out"
    engine = Engine.from_pretrained(folder, dtype="float32")
    return request.param, sweep(engine, text=text, tokens=800, out=out, quick=False), out


def test_depth_top_k_and_thresholds_are_swept_and_marked(
    swept: tuple[str, dict[str, Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, result, out = swept
    names = [point["name"] for point in result["points"]]
    assert {"full", "L3", "L2", "L1", "k1", "k2", "L2-k1", "t0.5"} <= set(names)
    assert not [name for name in names if "w" in name or "p" in name]
    assert [p["name"] for p in result["points"] if p["trained"]] == ["full"]
    show(result, out)
    printed = capsys.readouterr().out
    assert "* a value that the checkpoint was not trained for" in printed
    rows = [line.split()[:2] for line in printed.splitlines() if "%" in line]
    assert all((row[1] == "*") is (row[0] != "full") for row in rows)
    report = (out / "report.html").read_text()
    assert report.count('<abbr title="not trained">*</abbr>') == len(names) - 1
    assert "hollow: not trained" in report
    assert "says nothing of elastic training" in report
    assert " needs " in summary(result)  # a sub-network is named all the same
    assert summary(result).endswith("was not trained for smaller sub-networks.")


def test_layers_keep_their_numbers_where_some_are_dense(
    swept: tuple[str, dict[str, Any], Path],
) -> None:
    architecture, result, out = swept
    use = json.loads((out / "sweep.json").read_text())["expert_use"]
    ids = [1, 2, 3] if architecture == "ernie4_5_moe" else [0, 1, 2, 3]
    assert use["layer_ids"] == ids
    assert len(use["layers"]) == len(ids)
    figure = expert_use_figure(result)
    figure.draw_without_rendering()
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert [int(label) for label in labels if label] == ids
    most = max((share, layer) for layer, row in zip(ids, use["layers"], strict=True)
               for share in row)  # fmt: skip
    match = re.search(
        r"The most used expert \(\d+ of layer (\d+)\)", (out / "report.html").read_text()
    )
    assert match is not None
    assert int(match[1]) == most[1]


def test_a_subnetwork_of_dense_layers_alone_differs_in_depth_only(
    swept: tuple[str, dict[str, Any], Path],
) -> None:
    architecture, result, out = swept
    point = next(p for p in result["points"] if p["name"] == "L1")
    axes = [point[k] for k in ("top_k", "expert_width", "sparsity_threshold", "expert_pool")]
    report = (out / "report.html").read_text()
    assert (axes == [None] * 4) is (architecture == "ernie4_5_moe")
    assert "several of these" not in report
    depth = re.search(r"<h3>Depth</h3>.*?<figcaption>(.*?)</figcaption>", report, re.DOTALL)
    assert depth is not None
    assert depth[1].startswith("1: ")
