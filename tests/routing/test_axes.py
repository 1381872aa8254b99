"""The table of axes holds alone: a new row is found everywhere, and nothing else spells an axis."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.lab.schema import with_every_field
from elastic_moe.lab.view.frontier import changed_axes, full_point
from elastic_moe.routing import ModelShape
from elastic_moe.routing.axes import AXES, KEYS, Axis
from elastic_moe.train.step.plan import Stage, TrainingPlan
from elastic_moe.train.step.sampling import SamplingPlan

ROOT = Path(__file__).resolve().parents[2]

ROW = """
CAPACITY = Axis(
    "expert_capacity",
    "c",
    "count",
    title="Capacity",
    unit="tokens of each expert",
    part="token",
    size="num_experts",
    spellings=("capacity",),
    trained="capacity",
    chance=0.5,
)
GAIN = Axis(
    "gain",
    "g",
    "real",
    title="Gain",
    unit="gain of the router's logits",
    part="logit",
    largest=4.0,
    above_zero=True,
    full=1.0,
    cheaper=None,
    trained="gain",
)

AXES: """

FIELDS = "    expert_capacity: int = 0\n    gain: float = 0.0"

OLD_SWEEP = ROOT / "benchmarks" / "results" / "sweep-elastic-mini.json"
SHAPE = ModelShape(4, 8, 2, 1, 4, 16, 8, 2, 8, frozenset(range(4)), width_granules=4)
# The plan of a run from before the new axis, which never reduces one of the axes that it knows.
OLD_PLAN: dict[str, Any] = TrainingPlan(
    stages=(Stage(steps=200, layers=4, pieces=1, length=256),),
    sampling=SamplingPlan(full=0.2, width=0.0, threshold=0.5),
).to_json()

# Runs in a fresh interpreter on the temporary tree; prints what each place makes of the new axis.
PROBE = """
import sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in type(f).__module__]
import argparse, json, random
from dataclasses import replace
from pathlib import Path
from elastic_moe import config, protocol
from elastic_moe.cli import info, serve, sweep
from elastic_moe.errors import RoutingError, ServerError
from elastic_moe.lab.sweeps.grid import default_grid, is_trained, product_grid
from elastic_moe.lab.sweeps.results import _read
from elastic_moe.lab.view.frontier import changed_axes, full_point, untrained_axes
from elastic_moe.lab.view.report import render_report
from elastic_moe.model.config import ElasticBlock
from elastic_moe.protocol.routing import values
from elastic_moe.routing import ModelShape, parse_name, resolve
from elastic_moe.routing.axes import TRAINED, find
from elastic_moe.server.routing.limits import Limits
from elastic_moe.train.config import TrainConfig
from elastic_moe.train.export import trained_axes
from elastic_moe.train.ledger import _values
from elastic_moe.train.options import add_arguments
from elastic_moe.train.step.plan import TrainingPlan
from elastic_moe.train.step.sampling import SamplingPlan, sample_subnet, smallest_subnet

shape = SHAPE
elastic = ElasticBlock(4, trained={"capacity": (2, 8), "gain": (0.5, 1.0, 2.0)})

def help_of(add):
    parser = argparse.ArgumentParser()
    add(parser)
    return parser, " ".join(parser.format_help().split())

def refusal(**values):
    try:
        resolve(shape, **values)
    except RoutingError as error:
        return str(error)

serving, serve_help = help_of(serve.add_arguments)
_, sweep_help = help_of(sweep.add_arguments)
training, train_help = help_of(add_arguments)
limits = serve.read_limits(serving.parse_args(["--max-capacity", "3"]))
gains = serve.read_limits(serving.parse_args(["--max-gain", "0.7"]))

def wrong_limit(**bounds):
    try:
        Limits(**bounds).check(shape)
    except ServerError as error:
        return str(error)

two = resolve(shape, capacity=2)
always = SamplingPlan(capacity=1.0, depth=0, top_k=0, width=0, pool=0, threshold=0)
drawn = [sample_subnet(shape, always, range(4), random.Random(seed)) for seed in range(20)]
only_gain = SamplingPlan(**{**dict.fromkeys((a.trained for a in TRAINED), 0.0), "gain": 1.0})
gained = [sample_subnet(shape, only_gain, range(4), random.Random(seed)) for seed in range(20)]
plan = TrainingPlan.from_json(OLD_PLAN)
sweep = _read(Path(OLD_SWEEP))
whole_points = sweep["points"]
whole = full_point(whole_points)
swept = json.loads(Path(OLD_SWEEP).read_bytes())
swept["points"].append({**swept["points"][0], "name": "g2", "gain": 2.0})
sizes = {axis.size: axis.most(shape) for axis in TRAINED if axis.size}
print(json.dumps({
    "name": two.name,
    "parsed": parse_name(shape, "c2-L3").layers[0].expert_capacity,
    "per layer": parse_name(shape, "c2x1,3x3").name,
    "range": refusal(expertCapacity=9),
    "serve": serve_help,
    "sweep": sweep_help,
    "train": train_help,
    "limited": limits.apply(resolve(shape)).name,
    "limit": limits["expert_capacity"],
    "grid": [subnet.name for subnet in default_grid(shape, elastic).subnets],
    "product": [subnet.name for subnet in product_grid(shape, {"expert_capacity": [1, 2]}).subnets],
    "trained": [is_trained(resolve(shape, capacity=c), elastic) for c in (2, 3)],
    "schema": sorted(config.RoutingConfig.model_json_schema()["properties"]),
    "answer schema": sorted(protocol.AppliedRouting.model_json_schema()["properties"]),
    "answer": values(two)["expert_capacity"],
    "client": config.ElasticRoutingConfig.full(expertCapacity=2).resolve(shape).name,
    "wire": config.RoutingConfig.parse({"capacity": 2}).resolve(shape).name,
    "reduce": TrainConfig(reduce={"capacity": 0.25}).chance("capacity"),
    "drawn": sorted({subnet.name for subnet in drawn}),
    "old draws": [plan.subnet(shape, step).name for step in range(200)],
    "old sweep": [
        [p["expert_capacity"], [a.name for a in changed_axes(p, whole)]] for p in sweep["points"]
    ],
    "old untrained": sorted({a for p in whole_points for a in untrained_axes(p, sweep["model"])}),
    "old report": "Capacity" in render_report(json.loads(Path(OLD_SWEEP).read_bytes())),
    "old fixed": replace(plan, sampling=SamplingPlan(fixed="L2")) == TrainingPlan.from_json(
        {**OLD_PLAN, "sampling": {"fixed": "L2"}}
    ),
    "smallest": smallest_subnet(shape, always, range(4)).name,
    "ledger": _values(two, [0, 1, 2, 3])["capacity"],
    "gain": {
        "name": resolve(shape, gain=0.5).name,
        "parsed": parse_name(shape, "g2x1,1x3").layers[0].gain,
        "full": resolve(shape).layers[0].gain,
        "ranges": [refusal(gain=value) for value in (0, 1e-50, 4.5)],
        "largest": resolve(shape, gain=4).name,
        "limited": gains.apply(resolve(shape)).name,
        "limits": [wrong_limit(gain=(None, 0)), wrong_limit(gain=(4.5, None))],
        "grid": [subnet.name for subnet in default_grid(shape, elastic).subnets],
        "trained": [is_trained(resolve(shape, gain=g), elastic) for g in (0.4, 0.6, 1, 2, 2.1)],
        "wire": config.RoutingConfig.parse({"gain": 2}).resolve(shape).name,
        "answer": values(resolve(shape, gain=0.5))["gain"],
        "drawn": sorted({subnet.name for subnet in gained}),
        "smallest": smallest_subnet(shape, only_gain, range(4)).name,
        "ledger": _values(resolve(shape, gain=0.5), [0, 1, 2, 3])["gain"],
        "info": info._range(find("gain"), sizes, [0.5, 1.0, 2.0]),
        "report": render_report(swept),
    },
    "fingerprints": len({subnet.fingerprint for subnet in (two, resolve(shape))}),
}))
"""


@pytest.fixture(scope="module")
def seventh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a tree says whose table has one row more; nothing else of it is changed."""
    root = tmp_path_factory.mktemp("tree")
    leave = shutil.ignore_patterns("__pycache__", "bundled")
    shutil.copytree(ROOT / "elastic_moe", root / "elastic_moe", ignore=leave)
    table = root / "elastic_moe" / "routing" / "axes.py"
    text = table.read_text(encoding="utf-8")
    for before, after in (
        ("\nAXES: ", ROW),
        (")  # a name's order", ") + (CAPACITY, GAIN)  # a name's order"),
        ("\n\n\nPER_LAYER", f"\n{FIELDS}\n\n\nPER_LAYER"),
    ):
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    table.write_text(text, encoding="utf-8")
    probe = PROBE.replace("OLD_SWEEP", repr(str(OLD_SWEEP)))
    probe = probe.replace("SHAPE", repr(SHAPE)).replace("OLD_PLAN", repr(OLD_PLAN))
    done = subprocess.run(
        [sys.executable, "-c", probe],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(ROOT / "kernels")])},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_new_axis_is_in_names_and_their_refusals(seventh: dict[str, Any]) -> None:
    assert seventh["name"] == "c2"
    assert seventh["parsed"] == 2
    assert seventh["per layer"] == "c2x1,3x3"
    assert "expert_capacity must be an integer in [1, 8], got 9" in seventh["range"]
    assert seventh["fingerprints"] == 2


def test_a_new_axis_is_in_every_help(seventh: dict[str, Any]) -> None:
    assert "--min-expert-capacity N" in seventh["serve"]
    assert "--max-expert-capacity N at most this many tokens of each expert" in seventh["serve"]
    assert "--expert-capacity N,N" in seventh["sweep"]
    assert "--reduce-capacity X" in seventh["train"]
    assert "(default: 0.5)" in seventh["train"]


def test_a_new_axis_is_limited(seventh: dict[str, Any]) -> None:
    assert seventh["limit"] == [None, 3]
    assert seventh["limited"] == "c3"


def test_a_new_axis_is_in_the_grid_of_a_sweep(seventh: dict[str, Any]) -> None:
    assert {"c2", "c4", "c6"} <= set(seventh["grid"])
    assert seventh["product"] == ["full", "c1", "c2"]
    assert seventh["trained"] == [True, False]


def test_a_new_axis_is_on_the_wire(seventh: dict[str, Any]) -> None:
    assert {"expert_capacity", "expertCapacity", "capacity"} <= set(seventh["schema"])
    assert "expert_capacity" in seventh["answer schema"]
    assert seventh["answer"] == 2
    assert seventh["client"] == seventh["wire"] == "c2"


def test_a_new_axis_is_trained(seventh: dict[str, Any]) -> None:
    assert seventh["reduce"] == 0.25
    assert set(seventh["drawn"]) <= {f"c{n}" for n in range(2, 8)}
    assert len(seventh["drawn"]) > 2
    assert seventh["smallest"] == "c2"
    assert seventh["ledger"] == [2, "2"]


def test_a_new_real_axis_has_the_range_of_its_row(seventh: dict[str, Any]) -> None:
    gain = seventh["gain"]
    assert (gain["name"], gain["largest"]) == ("g0.5", "g4")
    assert (gain["parsed"], gain["full"]) == (2.0, 1.0)
    for message, value in zip(gain["ranges"], ("0", "1e-50", "4.5"), strict=True):
        assert f"gain must be a number in (0, 4], got {value}" in message
    assert gain["wire"] == "g2"
    assert gain["answer"] == 0.5
    assert gain["info"] == "above 0 to 4; trained at 0.5-2.0"


def test_a_new_real_axis_is_limited(seventh: dict[str, Any]) -> None:
    assert seventh["gain"]["limited"] == "g0.7"
    for message, bound in zip(seventh["gain"]["limits"], ("max gain", "min gain"), strict=True):
        assert message.startswith(f"{bound} must be in (0, 4] for this model")
    assert "--max-gain T at most this gain of the router's logits" in seventh["serve"]


def test_a_new_real_axis_is_swept_and_drawn_in_a_report(seventh: dict[str, Any]) -> None:
    gain = seventh["gain"]
    assert {"g2", "g3", "g4"} <= set(gain["grid"])
    assert "g1" not in gain["grid"]  # full
    assert gain["trained"] == [False, True, True, True, False]
    assert "gain (g)" in gain["report"]


def test_a_new_real_axis_is_trained(seventh: dict[str, Any]) -> None:
    gain = seventh["gain"]
    drawn = [float(name.removeprefix("g")) for name in gain["drawn"]]
    assert 1.2 <= min(drawn) < max(drawn) <= 3.6
    assert len(drawn) > 10
    assert gain["smallest"] == "full"  # no gain is cheaper
    assert gain["ledger"] == [0.5, "0.50"]
    assert "--reduce-gain X" in seventh["train"]


def test_a_new_axis_changes_no_draw_of_a_plan_that_does_not_know_it(
    seventh: dict[str, Any],
) -> None:
    plan = TrainingPlan.from_json(OLD_PLAN)
    assert seventh["old draws"] == [plan.subnet(SHAPE, step).name for step in range(200)]
    assert len(set(seventh["old draws"])) > 20
    assert seventh["old fixed"] is True


def test_a_new_axis_is_full_in_a_sweep_that_does_not_know_it(seventh: dict[str, Any]) -> None:
    points = with_every_field(json.loads(OLD_SWEEP.read_bytes()))["points"]
    assert [value for value, _ in seventh["old sweep"]] == [16] * len(points)
    full = full_point(points)
    assert full is not None
    changed = [[axis.name for axis in changed_axes(point, full)] for point in points]
    assert [axes for _, axes in seventh["old sweep"]] == changed
    assert "expert_capacity" not in seventh["old untrained"]
    assert seventh["old report"] is True


# --- nothing else spells an axis

TABLE = "elastic_moe/routing/axes.py"
# Words of other things too: a pool of blocks, the width of a drawing, sampling's top_k. One of them
# is no vocabulary of axes; two of them in a file are.
QUOTED = re.compile(r"\"([^\"]*)\"|'([^']*)'")
ORDINARY = {"depth", "width", "pool", "threshold", "top_k", "topK"}


def files(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in (ROOT / "elastic_moe").rglob(pattern))


def strings(path: Path) -> list[str]:
    """The strings of a Python file that are no docstrings, or those in a template's code."""
    if path.suffix == ".j2":
        code = re.findall(r"\{[{%].*?[}%]\}", path.read_text(encoding="utf-8"), re.DOTALL)
        return [double or single for part in code for double, single in QUOTED.findall(part)]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
    ]


def test_no_other_file_spells_an_axis() -> None:
    found = []
    for path in files("*.py", "*.j2"):
        place = path.relative_to(ROOT).as_posix()
        spelled = {text for text in strings(path) if text in KEYS}
        if place != TABLE and (spelled - ORDINARY or len(spelled) > 1):
            found.append((place, sorted(spelled)))
    assert found == []


def test_no_other_file_has_a_table_of_letters() -> None:
    letters = {axis.letter for axis in AXES}
    found = []
    for path in files("*.py"):
        if path.relative_to(ROOT).as_posix() == TABLE:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Dict, ast.Tuple, ast.List, ast.Set)):
                inside = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                if len(inside & letters) >= 3:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []


def test_a_key_of_trained_values_must_be_a_spelling() -> None:
    row = {"title": "Floor", "unit": "score", "part": "expert", "spellings": ("floor",)}
    assert Axis("score_floor", "f", "real", **row, trained="floor").trained == "floor"
    with pytest.raises(ValueError, match="trained must be one of its spellings score_floor, floor"):
        Axis("score_floor", "f", "real", **row, trained="least")
