"""What a run's folder or a checkpoint's manifest says of a training, and what is neither."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.errors import CheckpointError, OptionError, TrainingError
from elastic_moe.lab.cost.budget import make_budget
from elastic_moe.lab.cost.training import Training, read_training, within
from elastic_moe.model.checkpoints.checkpoint import load_config
from elastic_moe.model.checkpoints.extract import extract
from elastic_moe.model.checkpoints.folder import BUNDLED
from elastic_moe.routing import parse_name, resolve
from elastic_moe.train.ledger import replay
from elastic_moe.train.runs.loop import run_steps
from elastic_moe.train.step.plan import TrainingPlan
from elastic_moe.train.step.sampling import SamplingPlan
from elastic_moe.train.step.state import load_state, save_state
from tests.train.tiny import CONFIG, PLAN, trainer


def manifest(
    steps: int, flops: float, before: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    training = {"plan": PLAN.to_json(), "steps": steps, "flops": flops} | more
    return {"corpus": {}, "training": training} | ({} if before is None else {"before": before})


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped at step 4 of 14, whose log was written further than its state."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    done = trainer(replace(PLAN, save_every_steps=2))
    run_steps(done, folder, max_seconds=0)
    for _ in range(4):
        done.train_step()
    done.save(folder / "state.safetensors")
    lines = [json.dumps({"step": n, "seconds": 0.25 * n}) for n in range(1, 7)]
    (folder / "log.jsonl").write_text("\n".join([*lines, '{"step": 4, "sec']))
    return folder


def test_a_run_is_counted_from_its_plan_as_far_as_its_state(run_folder: Path) -> None:
    found = read_training(run_folder)
    plan = replace(PLAN, save_every_steps=2)
    assert (found.name, found.kind, found.steps) == ("small", "run", 4)
    assert found.shape == CONFIG.shape
    assert found.plan == plan
    assert found.flops == replay(plan, CONFIG.shape, 4).flops
    assert found.tokens == 4 * 512


def test_time_is_that_of_the_steps_in_the_state(run_folder: Path) -> None:
    found = read_training(run_folder)
    assert found.seconds == 0.25 * (1 + 2 + 3 + 4)
    measured = make_budget(found)["super_network"]["measured"]
    assert measured == {
        "seconds": 2.5,
        "timed_steps": 4,
        "flops_per_second": found.flops / 2.5,
    }


def test_a_rate_needs_the_time_of_every_step(run_folder: Path, tmp_path: Path) -> None:
    for name in ("plan.json", "state.safetensors"):
        (tmp_path / name).symlink_to(run_folder / name)
    found = read_training(tmp_path)
    assert found.seconds is None
    assert make_budget(found)["super_network"]["measured"] is None
    (tmp_path / "log.jsonl").write_text('{"step": 1, "seconds": 2}\n{"step": 2}\n')
    measured = make_budget(read_training(tmp_path))["super_network"]["measured"]
    assert measured == {"seconds": 2, "timed_steps": 1, "flops_per_second": None}


def test_a_run_says_which_weights_it_began_with(tmp_path: Path) -> None:
    first, later = trainer(), trainer()
    later.adopt(dict(first.model.named_parameters()), "first")
    later.train_step()
    later.save(tmp_path / "state.safetensors")
    assert read_training(tmp_path).parent == "first"


def test_a_checkpoint_is_counted_by_its_manifest(tiny_folder: Path, tmp_path: Path) -> None:
    manifest = json.loads((BUNDLED / "elastic-mini" / "manifest.json").read_text())
    found = read_training("elastic-mini")
    assert (found.name, found.kind) == ("elastic-mini", "checkpoint")
    assert (
        sum(part.tokens for part in (*found.before, found))
        == load_config(BUNDLED / "elastic-mini").elastic.tokens
    )
    assert found.flops == manifest["training"]["flops"]
    assert found.tokens == manifest["training"]["tokens"]
    assert found.seconds is None
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(tiny_folder / "config.json", copy)
    record = {"plan": PLAN.to_json(), "steps": 3, "flops": 12345.0}
    record |= {"parent": "first", "tokens_before": 77}
    (copy / "manifest.json").write_text(json.dumps({"training": record}))
    later = read_training(copy)
    assert (later.flops, later.parent, later.tokens_before) == (12345.0, "first", 77)


def test_the_trainings_before_are_those_that_the_manifest_holds(
    tmp_path: Path, tiny_folder: Path
) -> None:
    shutil.copy(tiny_folder / "config.json", tmp_path)

    record = manifest(3, 100.0, before=manifest(2, 10.0, before=manifest(1, 1.0)))
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    found = read_training(tmp_path)
    assert [(part.steps, part.flops) for part in found.before] == [(1, 1.0), (2, 10.0)]
    assert make_budget(found)["super_network"]["flops"] == 111.0


def test_a_run_knows_the_trainings_before_by_the_manifest_that_it_kept(
    run_folder: Path, tmp_path: Path
) -> None:
    for name in ("plan.json", "state.safetensors"):
        (tmp_path / name).symlink_to(run_folder / name)
    assert read_training(tmp_path).before == ()
    (tmp_path / "parent-manifest.json").write_text(
        json.dumps(manifest(3, 100.0, before=manifest(2, 10.0, tokens_before=77)))
    )
    found = read_training(tmp_path)
    assert [(part.kind, part.name, part.steps) for part in found.before] == [
        ("parent", "", 2),
        ("parent", "", 3),
    ]
    assert (found.kind, found.steps) == ("run", 4)
    assert found.tokens_before == 77 + (2 + 3) * 512


def test_a_long_chain_is_read_without_recursion(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_folder / "config.json", tmp_path)
    record = manifest(1, 1.0)
    for _ in range(400):
        record = manifest(1, 1.0, before=record)
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 600)
    try:
        assert len(read_training(tmp_path).before) == 400
    finally:
        sys.setrecursionlimit(limit)


@pytest.mark.parametrize("there", [False, True])
def test_what_is_neither_run_nor_checkpoint_is_refused(there: bool, tmp_path: Path) -> None:
    folder = tmp_path / "nothing"
    if there:
        folder.mkdir()
        (folder / "notes.txt").write_text("no run")
    with pytest.raises(OptionError) as error:
        read_training(folder)
    for words in (str(folder), "plan.json", "state.safetensors", "manifest.json", "elastic-mini"):
        assert words in str(error.value)


def test_a_checkpoint_that_does_not_tell_of_its_training_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(OptionError, match="without a record of its training: it has no manifest"):
        read_training(tiny_folder)


def test_an_extracted_checkpoint_tells_how_the_whole_was_trained(tmp_path: Path) -> None:
    extract(BUNDLED / "elastic-mini", "L2-k1-w1-p1", tmp_path / "small")
    whole, found = read_training("elastic-mini"), read_training(tmp_path / "small")
    assert found.name == "small"
    assert found.cut == parse_name(whole.shape, "L2-k1-w1-p1")
    assert found.whole_shape == whole.shape
    assert (found.plan, found.steps, found.flops) == (whole.plan, whole.steps, whole.flops)
    assert [part.flops for part in found.before] == [part.flops for part in whole.before]
    assert {part.cut for part in found.before} == {whole.cut} == {None}


def test_what_was_cut_out_in_two_steps_is_a_part_of_the_whole(tmp_path: Path) -> None:
    pools = [[0, 1, 2, 3]] * 48
    pools[7] = [1, 3, 5, 7]
    shape = read_training("elastic-mini").shape
    first = resolve(shape, active_layers=[3, 5, 7, 40], expert_pool=pools)
    extract(BUNDLED / "elastic-mini", first, tmp_path / "first")
    second = resolve(
        load_config(tmp_path / "first").shape,
        active_layers=[0, 2],
        top_k=2,
        expert_width=4,
        expert_pool=[1, 2],
    )
    extract(tmp_path / "first", second, tmp_path / "second")
    found = read_training(tmp_path / "second").cut
    assert found is not None
    assert found.active_layers == (3, 7)
    assert [found.layers[i].expert_pool for i in (3, 7)] == [(1, 2), (3, 5)]
    assert {(found.layers[i].top_k, found.layers[i].expert_width) for i in (3, 7)} == {(2, 4)}
    assert found.shape == shape


def test_experts_that_a_bias_shuts_out_keep_their_numbers() -> None:
    whole = replace(CONFIG.shape, num_layers=2, moe_layers=frozenset({0, 1}), num_experts=4)
    outer = resolve(whole, active_layers=[0, 1], top_k=1, expert_pool=[[0, 2], [1, 2]])
    inner = resolve(whole, active_layers=[1], top_k=1, expert_pool=[2, 3])
    assert within(outer, inner).layers[1].expert_pool == (2,)
    cut = replace(whole, num_experts=2)
    inner = resolve(cut, active_layers=[1], top_k=1, expert_pool=[1])
    assert within(outer, inner).layers[1].expert_pool == (2,)


def test_an_extracted_checkpoint_without_a_manifest_names_its_parent(tmp_path: Path) -> None:
    extract(BUNDLED / "elastic-mini", "L2-k1-w1-p1", tmp_path / "small")
    (tmp_path / "small" / "manifest.json").unlink()
    with pytest.raises(OptionError, match="Name its parent, 'elastic-mini"):
        read_training(tmp_path / "small")


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: record["routing"].update(active_layers=[0]),  # two layers were extracted
        lambda record: record["routing"].update(top_k=99),
        lambda record: record["routing"].update(other=1),
        lambda record: record["config"].pop("num_hidden_layers"),
        lambda record: record.pop("config"),
        lambda record: record.update(of=3),
        lambda record: record.update(of={"config": record["config"], "routing": {"depth": 3}}),
    ],
)
def test_what_does_not_tell_what_was_extracted_is_refused(damage: Any, tmp_path: Path) -> None:
    extract(BUNDLED / "elastic-mini", "L2-k1-w1-p1", tmp_path / "small")
    path = tmp_path / "small" / "manifest.json"
    record = json.loads(path.read_text())
    damage(record["extracted"])
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"'extracted' cannot be read .* as `elastic-moe ext"):
        read_training(tmp_path / "small")


@pytest.mark.parametrize(
    ("log", "what"),
    [
        (["5", "{}"], "line 1: no record of a step"),
        (["[1, 2]", "{}"], "line 1: no record of a step"),
        (['{"loss": 3}'], "line 1: no record of a step"),
        (['{"step": true}'], "line 1: no record of a step"),
        (['{"step": 1}', "\udcff", '{"step": 3}'], "line 2: no record of a step"),
        (['{"step": 1}', '{"step": 2, "se', '{"step": 3}'], "line 2: no record of a step"),
        (['{"step": 1}', '{"step": 1}'], "line 2: step 1 after step 1"),
        (['{"step": 0}'], "line 1: step 0 after step 0"),
        (['{"step": 1, "seconds": null}'], "line 1: seconds must be a number of at least 0, got N"),
        (['{"step": 1, "seconds": "a"}'], "got 'a'"),
        (['{"step": 1, "seconds": NaN}'], "got nan"),
        (['{"step": 1, "seconds": Infinity}'], "got inf"),
        (['{"step": 1, "seconds": -5}'], "got -5"),
    ],
)
def test_a_log_of_anything_else_is_refused_by_its_line(
    log: list[str], what: str, run_folder: Path, tmp_path: Path
) -> None:
    for name in ("plan.json", "state.safetensors"):
        (tmp_path / name).symlink_to(run_folder / name)
    (tmp_path / "log.jsonl").write_bytes("\n".join(log).encode("utf-8", "surrogateescape"))
    with pytest.raises(TrainingError, match=re.escape(what)) as error:
        read_training(tmp_path)
    assert "Restore the file, or delete it" in str(error.value)


def test_a_run_without_a_saved_step_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(PLAN.to_json()))
    with pytest.raises(TrainingError, match=r"has plan.json and no state.safetensors"):
        read_training(tmp_path)
    trainer().save(tmp_path / "state.safetensors")
    with pytest.raises(TrainingError, match="is at step 0 of 14"):
        read_training(tmp_path)
    (tmp_path / "state.safetensors").write_bytes(b"half a file")
    with pytest.raises(TrainingError, match="is no training state that this version reads"):
        read_training(tmp_path)


def changed_plan(**changes: Any) -> dict[str, Any]:
    return {"plan": PLAN.to_json() | changes}


def changed_stage(**changes: Any) -> dict[str, Any]:
    first, *others = PLAN.to_json()["stages"]
    return changed_plan(stages=[first | changes, *others])


FOREIGN = {
    "no plan": {"plan": None},
    "an empty plan": {"plan": {}},
    "a plan of words": {"plan": "48 layers"},
    "sampling of words": changed_plan(sampling="all"),
    "an unknown field": changed_plan(epochs=3),
    "a rate out of its range": changed_plan(muon_lr=-1),
    "no stages": changed_plan(stages=[]),
    "a stage of numbers": changed_plan(stages=[3]),
    "a stage of fractions": changed_stage(layers=2.0),
    "a stage of other layers": changed_stage(layers=7),
    "a stage without end": changed_stage(steps=10**400),
    "an unknown network": changed_plan(sampling={"fixed": "L99"}),
    "no step": {"steps": 0},
    "steps past the plan": {"steps": 99},
    "half a step": {"steps": 2.5},
    "flops of words": {"flops": "many"},
    "flops without end": {"flops": 10**400},
    "no flops": {"flops": 0},
    "a parent that is no text": {"parent": ["first"]},
    "tokens of words": {"tokens_before": "77"},
    "tokens below none": {"tokens_before": -1},
}


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("nested", [False, True])
def test_a_foreign_manifest_is_refused_by_its_place(
    change: dict[str, Any], nested: bool, tiny_folder: Path, tmp_path: Path
) -> None:
    shutil.copy(tiny_folder / "config.json", tmp_path)
    record = manifest(3, 1.0)
    record["training"] |= change
    if nested:
        record = manifest(3, 1.0, before=record)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(record))
    place = "before.training" if nested else "training"
    with pytest.raises(CheckpointError, match=rf"{path}: '{place}' cannot be read \(\w*Error\("):
        read_training(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"training": {"plan": ', r"manifest\.json cannot be read: Expecting value"),
        ("[]", r"manifest\.json must hold a JSON object, got list"),
        ('{"training": 3}', "'training' cannot be read"),
        ('{"training": {}}', "'training' cannot be read"),
    ],
)
def test_a_torn_manifest_is_refused(
    text: str, message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    shutil.copy(tiny_folder / "config.json", tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_training(tmp_path)


@pytest.mark.parametrize("before", [3, "first", [], {}, {"corpus": {}}])
def test_a_manifest_before_that_is_none_is_refused(
    before: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    shutil.copy(tiny_folder / "config.json", tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest(3, 1.0, before=before)))
    with pytest.raises(CheckpointError, match=r"'before\.training' cannot be read"):
        read_training(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"corpus": {}, "training": {"tok', "is no manifest of a checkpoint"),
        ('{"corpus": {}, "training": {}}', r"parent-manifest\.json: 'training' cannot be read"),
    ],
)
def test_a_run_that_kept_no_manifest_of_its_parent_is_refused(
    text: str, message: str, run_folder: Path, tmp_path: Path
) -> None:
    for name in ("plan.json", "state.safetensors"):
        (tmp_path / name).symlink_to(run_folder / name)
    (tmp_path / "parent-manifest.json").write_text(text)
    with pytest.raises((CheckpointError, TrainingError), match=message):
        read_training(tmp_path)


def test_a_state_with_a_foreign_plan_is_refused_by_its_file(tmp_path: Path) -> None:
    trainer().save(tmp_path / "state.safetensors")
    tensors, progress = load_state(tmp_path / "state.safetensors")
    progress["plan"]["epochs"] = 3
    save_state(tmp_path / "state.safetensors", tensors, progress)
    with pytest.raises(TrainingError, match=r"state\.safetensors is no training state .*epochs"):
        read_training(tmp_path)


# --- what a training is


def record(plan: TrainingPlan, **more: Any) -> Training:
    return Training("", Path("tiny"), "parent", CONFIG.shape, plan, 3, 1.0, **more)


def test_one_training_is_known_by_its_plan_and_its_first_weights() -> None:
    one = record(PLAN, parent="first")
    assert one.is_same(record(replace(PLAN, save_every_steps=99), parent="first", seconds=2.0))
    assert one.is_same(replace(one, steps=4, path=Path("elsewhere")))
    assert not one.is_same(record(PLAN, parent="another"))
    assert not one.is_same(record(PLAN))
    assert not one.is_same(record(replace(PLAN, seed=1), parent="first"))


@pytest.mark.parametrize(
    ("fixed", "name"), [("", None), ("full", None), ("L6", None), ("L4", "L4"), ("k1-w2", "k1-w2")]
)
def test_a_training_is_of_a_sub_network_alone_where_that_is_a_proper_one(
    fixed: str, name: str | None
) -> None:
    alone = record(replace(PLAN, sampling=SamplingPlan(fixed=fixed))).alone
    assert (None if alone is None else alone.name) == name
