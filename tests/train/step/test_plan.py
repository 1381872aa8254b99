"""A plan says what each step does, refuses what cannot be done, and replays to a true ledger."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest

from elastic_moe.errors import TrainingError
from elastic_moe.model.checkpoints.folder import BUNDLED
from elastic_moe.routing import resolve
from elastic_moe.routing.axes import TRAINED
from elastic_moe.train.ledger import replay
from elastic_moe.train.models import ELASTIC_MINI
from elastic_moe.train.step.plan import Pass, Stage, TrainingPlan, completed, parse_stages
from elastic_moe.train.step.sampling import SamplingPlan

SHAPE = ELASTIC_MINI.shape
ONLY_K = SamplingPlan(depth=0, pool=0, width=0, threshold=0, top_k=0.9, per_layer=0)
STAGES = parse_stages("12x40x4x256,48x60x8x512")
NEVER = dict.fromkeys(("depth", "top_k", "width", "pool", "threshold"), 0.0)


def test_a_network_that_has_not_grown_yet_runs_layers_spread_over_its_depth() -> None:
    sampling = SamplingPlan(depth=0.5)
    stages = parse_stages("12x200x4x256,24x1x4x256,48x1x4x256")
    plan = TrainingPlan(stages=stages, sampling=sampling)
    assert plan.stages[0].grown(48) == list(range(0, 48, 4))
    assert plan.stages[1].grown(48) == list(range(0, 48, 2))
    assert plan.stages[2].grown(48) == list(range(48))
    subnets = [plan.subnet(SHAPE, step) for step in range(200)]
    assert all(set(s.active_layers) <= set(range(0, 48, 4)) for s in subnets)
    assert max(len(s.active_layers) for s in subnets) == 12
    prefixes = {s.active_layers for s in subnets}
    assert (0, 4, 8) in prefixes


def test_rates_warm_up_stay_and_decay() -> None:
    plan = TrainingPlan(stages=(Stage(1000, 48, 4, 256),), warmup_steps=10, decay_fraction=0.2)
    scales = [plan.lr_scale(step) for step in range(1000)]
    assert scales[0] == 0.1
    assert scales[9:800] == [1.0] * 791
    assert scales[900] == pytest.approx(0.5)
    assert scales[-1] == plan.final_lr
    assert all(after <= before for before, after in pairwise(scales[9:]))


def test_stages_are_read_and_checked() -> None:
    stages = parse_stages("12x10x4x256,48x5x8x512")
    assert stages == (Stage(10, 12, 4, 256), Stage(5, 48, 8, 512))
    plan = TrainingPlan(stages=stages)
    assert [plan.stage(step).layers for step in (0, 9, 10, 14)] == [12, 12, 48, 48]
    with pytest.raises(TrainingError, match="step 15 is past the plan, which has 15 steps"):
        plan.stage(15)
    for bad in ("12x10x4", "axbxcxd", "12x10x4x300", "0x1x1x256"):
        with pytest.raises(TrainingError, match="stage"):
            parse_stages(bad)
    with pytest.raises(TrainingError, match=r"Stage\(.*length=300\): .* length must divide 512"):
        Stage(steps=1, layers=1, pieces=1, length=300)


def test_a_plan_survives_json_and_reads_what_an_older_version_wrote() -> None:
    sampling = SamplingPlan(depth=0.5, fixed="")
    plan = TrainingPlan(stages=STAGES, sampling=sampling, distill=0.5, dtype="bfloat16")
    data = json.loads(json.dumps(plan.to_json()))
    assert TrainingPlan.from_json(data) == plan
    for new in ("distill", "sandwich", "split", "bias_rate", "dtype"):
        del data[new]
    del data["sampling"]["fixed"]
    plain = TrainingPlan(stages=STAGES, sampling=sampling)
    assert TrainingPlan.from_json(data) == plain
    assert completed(data, "x") == json.loads(json.dumps(plain.to_json()))
    with pytest.raises(TrainingError, match="colour = 3 is no field that this version knows"):
        TrainingPlan.from_json({**data, "colour": 3})
    for foreign in ({}, {"stages": [], "sampling": None}, [], {**data, "stages": [{"steps": 1}]}):
        with pytest.raises(TrainingError, match="plan: an object with stages and sampling is need"):
            TrainingPlan.from_json(foreign)
    with pytest.raises(TrainingError, match="height = 1 is no field"):
        TrainingPlan.from_json({**data, "sampling": {"height": 1}})


FROM_ZERO = ("muon_lr", "adam_lr", "weight_decay", "decay_fraction", "final_lr", "balance", "clip")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"distill": 1.5}, r"plan: distill must be a number in \[0, 1\], got 1\.5"),
        ({"distill": float("nan")}, "distill must be"),
        ({"bias_rate": -1e-3}, r"bias_rate must be a number at least 0, got -0\.001"),
        ({"adam_lr": float("inf")}, "adam_lr must be"),
        ({"muon_lr": "0.1"}, "muon_lr must be a number"),
        ({"warmup_steps": 0}, "warmup_steps must be a number at least 1, got 0"),
        ({"decay_fraction": 2}, "decay_fraction must be"),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16, got 'float16'"),
        ({"stages": ()}, "stages must have at least one stage"),
        ({"distill": 0.5, "sampling": SamplingPlan(fixed="L9")}, "distill = 0.5 needs reduced"),
        ({"distill": 0.5, "sampling": SamplingPlan(full=1.0)}, "distill = 0.5 needs reduced"),
        ({"sandwich": True, "sampling": SamplingPlan(**NEVER)}, "sandwich = True needs reduced"),
        (
            {"sandwich": True, "sampling": SamplingPlan(full=0.5)},
            "full = 0.5 has no meaning beside sandw",
        ),
        ({"split": 0.5, "sampling": SamplingPlan(full=0.5)}, "no meaning beside split: every step"),
        ({"split": 0.5, "sampling": SamplingPlan(**NEVER)}, r"split = 0\.5 needs reduced networks"),
        (
            {"split": 0.5, "sandwich": True},
            r"sandwich and split = 0\.5 are two ways to run the full",
        ),
        ({"split": 1}, r"plan: split must be a number in \[0, 0\.99\d+\], got 1"),
        (
            {"split": 0.5, "stages": (Stage(1, 48, 2, 256), Stage(1, 48, 1, 512))},
            "stage 1: a step must have at least 2 sequences to split, got 1",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_values_that_no_run_can_follow_are_refused(values: dict, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        TrainingPlan(**{"stages": STAGES, **values})


@pytest.mark.parametrize(
    ("name", "least"),
    [("warmup_steps", 1), ("save_every_steps", 1), *((name, 0) for name in FROM_ZERO)],
)
def test_the_least_value_is_taken_and_nothing_below_it(name: str, least: int) -> None:
    assert getattr(TrainingPlan(stages=STAGES, **{name: least}), name) == least
    with pytest.raises(TrainingError, match=f"{name} must be"):
        TrainingPlan(stages=STAGES, **{name: least - 1})


def test_two_sequences_can_be_split() -> None:
    assert TrainingPlan(stages=(Stage(1, 48, 1, 256),), split=0.5).stages[0].sequences == 2


def test_what_a_model_lacks_is_refused() -> None:
    biased = replace(ELASTIC_MINI, model_type="ernie4_5_moe", selection_bias=True)
    plan = TrainingPlan(stages=STAGES, bias_rate=0.001)
    plan.check_model(biased)
    with pytest.raises(TrainingError, match=r"bias_rate must be 0 for .*'qwen3_moe'.*got 0\.001"):
        plan.check_model(ELASTIC_MINI)
    fixed = TrainingPlan(stages=STAGES, sampling=SamplingPlan(fixed="k5"))
    with pytest.raises(TrainingError, match=r"fixed = 'k5': .*top_k must be .* \[1, 4\], got 5"):
        fixed.check_model(ELASTIC_MINI)
    short = replace(ELASTIC_MINI, max_positions=511)
    with pytest.raises(TrainingError, match=r"stage 1: length .* 511 positions, got 512"):
        TrainingPlan(stages=STAGES).check_model(short)
    with pytest.raises(TrainingError, match="tied_embeddings must be True, got False"):
        plan.check_model(replace(biased, tied_embeddings=False))


def test_a_step_trains_the_drawn_network_or_a_sandwich() -> None:
    plan = TrainingPlan(stages=STAGES)
    for step, sequences in ((0, 8), (1, 8), (40, 8)):
        assert plan.passes(SHAPE, step) == (
            Pass(plan.subnet(SHAPE, step), slice(0, sequences), 1.0),
        )
    sandwich = TrainingPlan(stages=STAGES, sandwich=True)
    for step in (0, 40, 41, 42):
        passes = sandwich.passes(SHAPE, step)
        assert {(one.rows.start, one.rows.stop, one.weight) for one in passes} == {(0, 8, 1 / 3)}
        full, smallest, drawn = (one.subnet for one in passes)
        grown = sandwich.stage(step).grown(48)
        assert full == sandwich.whole(SHAPE, step) == resolve(SHAPE, active_layers=grown)
        assert smallest.depth == len(grown) // 8 + (len(grown) == 12)
        assert drawn == sandwich.subnet(SHAPE, step) != full


@pytest.mark.parametrize(
    ("split", "of_full"), [(0.75, 6), (0.7, 6), (0.5, 4), (0.01, 1), (0.99, 7)]
)
def test_a_split_step_runs_the_full_network_on_its_share_of_the_sequences(
    split: float, of_full: int
) -> None:
    """Rounded to whole sequences, and at least one for either."""
    plan = TrainingPlan(stages=STAGES, split=split)
    for step in (0, 40, 41, 42):
        assert plan.subnet(SHAPE, step) != plan.whole(SHAPE, step)
        assert plan.passes(SHAPE, step) == (
            Pass(plan.whole(SHAPE, step), slice(0, of_full), of_full / 8),
            Pass(plan.subnet(SHAPE, step), slice(of_full, 8), 1 - of_full / 8),
        )


def test_the_teacher_runs_where_the_full_network_is_not_trained_anyway() -> None:
    for options, rows in (
        ({}, []),
        ({"distill": 0.5, "sampling": ONLY_K}, [slice(0, 8)]),
        ({"distill": 0.5, "sandwich": True}, []),
        ({"split": 0.75}, []),
        ({"distill": 0.5, "split": 0.75}, [slice(6, 8)]),
    ):
        plan = TrainingPlan(stages=STAGES, **options)
        step = next(s for s in range(9) if plan.subnet(SHAPE, s) != plan.whole(SHAPE, s))
        assert plan.untrained_teacher(SHAPE, step) == rows, options
    plain = TrainingPlan(stages=STAGES, distill=0.5)
    full = next(s for s in range(99) if plain.subnet(SHAPE, s) == plain.whole(SHAPE, s))
    assert plain.untrained_teacher(SHAPE, full) == []


def test_a_stage_with_more_layers_than_the_model_is_refused() -> None:
    plan = TrainingPlan(stages=parse_stages("12x1x4x256,49x1x4x256"))
    plan.check(49)
    with pytest.raises(TrainingError, match=r"stage 1: layers must be in \[1, 48\], got 49"):
        plan.check(48)


def test_the_work_of_a_plan_is_tokens_times_layers() -> None:
    plan = TrainingPlan(stages=parse_stages("12x10x4x256,48x5x8x512"))
    first, second = 12 * 4 * 512, 48 * 8 * 512
    assert [plan.work(n) for n in (0, 1, 10, 11, 15)] == [
        0,
        first,
        10 * first,
        10 * first + second,
        10 * first + 5 * second,
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"distill": 0.5},
        {"sandwich": True},
        {"sandwich": True, "sampling": ONLY_K},  # what is drawn is often the smallest
        {"split": 0.75},
        {"split": 0.75, "distill": 0.5},
    ],
    ids=["plain", "distilled", "sandwich", "sandwich-of-two", "split", "split-distilled"],
)
def test_the_ledger_counts_what_the_plan_draws(options: dict) -> None:
    plan = TrainingPlan(stages=STAGES, **options)
    ledger = replay(plan, SHAPE, 100)
    drawn = [[one.subnet for one in plan.passes(SHAPE, step)] for step in range(100)]
    subnets = [subnet for of_step in drawn for subnet in of_step]
    assert ledger.tokens == 40 * 4 * 512 + 60 * 8 * 512
    names = {"Lx111111111111", "full"}
    assert ledger.full_steps == sum(any(s.name in names for s in nets) for nets in drawn)
    assert all(sum(counts.values()) == len(subnets) for counts in ledger.draws.values())
    late = [s.depth for nets in drawn[40:] for s in nets if s.is_prefix]
    assert ledger.trained["depth"] == set(late)
    expected = 0.0
    for step, nets in enumerate(drawn):
        tokens, context = (2048, 128) if step < 40 else (4096, 256)
        shares = (0.75, 0.25) if "split" in options else (1,) * len(nets)
        costs = [s.flops_per_token(context) for s in nets]
        per_token = 3 * sum(share * cost for share, cost in zip(shares, costs, strict=True))
        if "distill" in options and (len(nets) == 2 or nets[0].name not in names):
            per_token += shares[-1] * plan.whole(SHAPE, step).flops_per_token(context)  # teacher
        expected += per_token * tokens
    assert ledger.flops == pytest.approx(expected)


def test_a_specialist_claims_its_own_values_alone() -> None:
    plan = TrainingPlan(stages=STAGES, sampling=SamplingPlan(fixed="L36-p8"))
    trained = replay(plan, SHAPE, 100).trained
    whole = {str(axis.trained): {axis.whole(SHAPE)} for axis in TRAINED}
    known = {"depth": {36}, "top_k": {4}, "width": {8}, "pool": {8}, "threshold": {0.0}}
    assert trained == {**whole, **known}


def test_the_bundled_manifest_agrees_with_a_replay_of_its_plans() -> None:
    folder = BUNDLED / "elastic-mini"
    manifest = json.loads((folder / "manifest.json").read_text())
    elastic = json.loads((folder / "config.json").read_text())["elastic_moe"]
    tokens, seen = 0, {axis: set[float]() for axis in elastic["trained"]}
    while manifest is not None:
        training = manifest["training"]
        ledger = replay(TrainingPlan.from_json(training["plan"]), SHAPE, training["steps"])
        draws = ledger.draws_to_json()
        known = training["draws"].keys()
        assert {axis: draws[axis] for axis in known} == training["draws"]
        assert all(len(draws[axis]) == 1 for axis in draws.keys() - known)  # axes added since
        assert ledger.tokens == training["tokens"]
        assert ledger.flops == pytest.approx(training["flops"])
        tokens += ledger.tokens
        for axis in known:
            seen[axis] |= ledger.trained.get(axis, set())
        manifest = manifest.get("before")
    assert tokens == elastic["tokens"]
    assert {axis: set(values) for axis, values in elastic["trained"].items()} == seen
