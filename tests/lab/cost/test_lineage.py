"""Which trainings a ledger counts, each once, and which of them refined a sub-network alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.errors import OptionError
from elastic_moe.lab.cost.budget import make_budget, scratch_flops
from elastic_moe.lab.cost.training import Training
from elastic_moe.model.checkpoints.checkpoint import Checkpoint
from elastic_moe.routing import parse_name
from elastic_moe.train.ledger import replay
from elastic_moe.train.step.plan import parse_stages
from elastic_moe.train.step.sampling import SamplingPlan
from tests.lab.cost.trainings import SHAPE, SMALL_PLAN, training

FIRST = training(steps=8, name="", kind="parent", path=Path("third"))
SECOND = training(replace(SMALL_PLAN, seed=2), 5, parent="first", name="", kind="parent")
THIRD = training(replace(SMALL_PLAN, seed=3), 6, parent="second", name="third", kind="checkpoint")
THIRD = replace(THIRD, before=(FIRST, SECOND), path=Path("third"))
RUN = replace(FIRST, name="first run", kind="run", seconds=4.0, timed_steps=8, path=Path("first"))
UNTIMED = replace(RUN, name="unlogged", seconds=None, timed_steps=0)
RESUMED = replace(RUN, plan=replace(SMALL_PLAN, save_every_steps=7))
SECOND_RUN = replace(SECOND, name="second run", kind="run", path=Path("second"))


@pytest.mark.parametrize(
    ("earlier", "names"),
    [
        ([], ["training 1 of 3", "training 2 of 3", "third"]),
        ([RUN], ["first run", "training 2 of 3", "third"]),
        ([RESUMED], ["first run", "training 2 of 3", "third"]),
        ([RUN, RUN], ["first run", "training 2 of 3", "third"]),
        ([SECOND_RUN], ["training 1 of 3", "second run", "third"]),
        ([RUN, SECOND_RUN], ["first run", "second run", "third"]),
        ([replace(SECOND_RUN, before=(FIRST,))], ["training 1 of 3", "second run", "third"]),
        ([replace(SECOND_RUN, before=(FIRST,)), RUN], ["first run", "second run", "third"]),
        # A name is better than none, and a time better than a name.
        ([replace(SECOND_RUN, before=(FIRST,)), UNTIMED], ["unlogged", "second run", "third"]),
        ([UNTIMED, RUN], ["first run", "training 2 of 3", "third"]),
        ([RUN, UNTIMED], ["first run", "training 2 of 3", "third"]),
    ],
    ids=lambda value: "-".join(one if isinstance(one, str) else one.name for one in value),
)
def test_a_training_that_is_told_of_twice_counts_once(
    earlier: list[Training], names: list[str]
) -> None:
    budget = make_budget(THIRD, earlier=earlier)
    assert [one["name"] for one in budget["trainings"]] == names
    assert [one["steps"] for one in budget["trainings"]] == [8, 5, 6]
    assert budget["super_network"]["flops"] == FIRST.flops + SECOND.flops + THIRD.flops
    assert budget["super_network"]["uncounted"] is None
    timed = any(one in (RUN, RESUMED) for one in earlier)
    measured = budget["super_network"]["measured"]
    assert measured == (
        {"seconds": 4.0, "timed_steps": 8, "flops_per_second": None} if timed else None
    )


@pytest.mark.parametrize("manifest_first", [False, True])
def test_a_run_that_is_told_of_by_a_manifest_has_the_flops_that_were_counted_then(
    manifest_first: bool,
) -> None:
    other = replace(RUN, flops=1.0)  # as a version counts that draws differently
    second = replace(SECOND_RUN, before=(FIRST,))
    budget = make_budget(THIRD, earlier=[second, other] if manifest_first else [other])
    assert budget["trainings"][0]["name"] == "first run"
    assert budget["super_network"]["flops"] == FIRST.flops + SECOND.flops + THIRD.flops


def test_the_trainings_before_an_earlier_one_count_too() -> None:
    record = replace(SECOND_RUN, before=(RUN,))
    alone = replace(THIRD, before=())
    assert make_budget(alone, earlier=[SECOND_RUN])["super_network"]["uncounted"] is not None
    budget = make_budget(alone, earlier=[record])
    assert [one["name"] for one in budget["trainings"]] == ["first run", "second run", "third"]
    assert budget["super_network"]["uncounted"] is None


def test_the_trainings_of_one_chain_are_as_many_as_it_tells_of() -> None:
    twice = replace(THIRD, before=(FIRST, replace(FIRST, steps=3)))
    assert [one["steps"] for one in make_budget(twice)["trainings"]] == [8, 3, 6]


@pytest.mark.parametrize(
    ("last", "earlier", "message"),
    [
        (THIRD, replace(RUN, steps=7), "first and third are one training, at step 7 and at s"),
        (THIRD, THIRD, "third is the training of third itself, or went on from it"),
        (RUN, THIRD, "third is the training of first itself, or went on from it"),
        (RUN, replace(THIRD, before=(replace(FIRST, steps=2),)), "third is the training of first"),
    ],
)
def test_what_it_did_not_go_on_from_is_refused(
    last: Training, earlier: Training, message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        make_budget(last, earlier=[earlier])


def test_weights_that_are_there_are_compared_with_those_that_the_next_one_began_with(
    tiny_folder: Path,
) -> None:
    sha256 = Checkpoint(tiny_folder).files.sha256()
    record = replace(RUN, path=tiny_folder)
    right = training(replace(SMALL_PLAN, seed=2), parent=f"tiny sha256:{sha256}")
    assert make_budget(right, earlier=[record])["super_network"]["uncounted"] is None
    wrong = training(replace(SMALL_PLAN, seed=2), parent="tiny sha256:0123")
    with pytest.raises(OptionError, match=r"has other weights \(sha256:.* with: tiny sha256:0123"):
        make_budget(wrong, earlier=[record])
    named = replace(wrong, parent="a name alone")  # nothing to compare with
    assert make_budget(named, earlier=[record])["super_network"]["uncounted"] is None


def test_the_weights_of_a_run_are_in_its_checkpoint(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").symlink_to(tiny_folder)
    wrong = training(replace(SMALL_PLAN, seed=2), parent="tiny sha256:0123")
    with pytest.raises(OptionError, match="has other weights"):
        make_budget(wrong, earlier=[replace(RUN, path=tmp_path)])


def test_another_model_is_told_by_the_sizes_that_differ() -> None:
    small = replace(RUN, shape=replace(SHAPE, num_layers=2, moe_layers=frozenset({0, 1})))
    with pytest.raises(OptionError, match="of another model than third: num_layers 2 instead of 6"):
        make_budget(replace(THIRD, before=()), earlier=[small])


# --- a network that was extracted, and trained on


def extracted(name: str, steps: int, whole: Training, **changes: Any) -> Training:
    """A training of what was extracted from `whole`, all of it in every step."""
    cut = parse_name(whole.shape, name)
    shape = replace(
        whole.shape,
        num_layers=cut.depth,
        moe_layers=frozenset(range(cut.depth)),
        max_top_k=cut.uniform("top_k"),
    )
    plan = replace(SMALL_PLAN, stages=parse_stages(f"{cut.depth}x8x1x128"))
    record = replace(whole, cut=cut, before=())
    one = training(plan, 1, parent="cut out", name="on", before=(*whole.before, record))
    flops = replay(plan, shape, steps).flops
    return replace(one, shape=shape, steps=steps, flops=flops, **changes)


def test_what_was_extracted_is_a_refinement_however_it_was_trained() -> None:
    on = extracted("L4-k1", 3, FIRST)
    budget = make_budget(on)
    assert budget["super_network"] == make_budget(FIRST)["super_network"]
    row = budget["networks"][0]
    assert (row["name"], row["refinement_done"]) == ("L4-k1", True)
    assert row["refinement_flops"] == on.flops
    assert row["scratch_flops"] == scratch_flops(FIRST.plan, 8, parse_name(SHAPE, "L4-k1"))
    assert [one["extracted"] for one in budget["trainings"]] == [False, True]


def test_a_part_of_what_was_extracted_is_named_as_a_part_of_the_whole() -> None:
    on = extracted("Lx3a", 3, FIRST)  # layers 1, 3, 4 and 5
    plan = replace(on.plan, sampling=SamplingPlan(fixed="L2"))
    row = make_budget(replace(on, plan=plan))["networks"][0]
    assert (row["name"], row["refinement_flops"]) == ("Lxa", on.flops)
    twice = extracted("L3", 2, on)
    budget = make_budget(twice)
    assert budget["networks"][0]["name"] == "Lx1a"
    assert budget["networks"][0]["refinement_flops"] == on.flops + twice.flops
    assert budget["super_network"]["flops"] == FIRST.flops


def test_a_part_that_was_refined_before_it_was_extracted_is_one_refinement() -> None:
    on = extracted("L4", 3, alone("L4", 6, before=(FIRST,)))
    budget = make_budget(on)
    assert [one["part"] for one in budget["trainings"]] == ["super-network", *["refinement"] * 2]
    assert [one["alone"] for one in budget["trainings"]] == [None, "L4", None]
    row = budget["networks"][0]
    assert (row["name"], row["refinement_flops"]) == ("L4", on.before[-1].flops + on.flops)


def test_a_run_that_is_named_as_well_keeps_what_was_extracted_from_it() -> None:
    on = extracted("L4", 3, FIRST)
    budget = make_budget(on, earlier=[RUN])
    assert [one["name"] for one in budget["trainings"]] == ["first run", "on"]
    assert budget["networks"][0]["name"] == "L4"


# --- a refinement that was done


def alone(name: str, steps: int, **changes: Any) -> Training:
    plan = replace(SMALL_PLAN, sampling=SamplingPlan(fixed=name))
    return training(plan, steps, name=f"only {name}", parent="super", **changes)


def test_a_refinement_that_was_done_is_the_row_of_its_sub_network() -> None:
    done = alone("L4", 6, before=(FIRST,), seconds=3.0, timed_steps=6)
    budget = make_budget(done)
    assert budget["super_network"] == make_budget(FIRST)["super_network"]
    assert budget["scratch_tokens"] == FIRST.tokens
    row, *others = budget["networks"]
    subnet = parse_name(SHAPE, "L4")
    assert (row["name"], row["refinement_done"]) == ("L4", True)
    assert row["refinement_tokens"] == done.tokens == 3 * 512 + 3 * 1024
    assert row["refinement_flops"] == done.flops
    assert row["refinement_of_super_network"] == done.flops / FIRST.flops
    assert row["scratch_flops"] == scratch_flops(FIRST.plan, 8, subnet)
    assert row["refinement_measured"] == {
        "seconds": 3.0,
        "timed_steps": 6,
        "flops_per_second": done.flops / 3,
    }
    usual = ["L3", "L1", "k1", "L3-k1"]  # without that which was refined
    assert [(one["name"], one["refinement_done"]) for one in others] == [(n, False) for n in usual]
    assert {one["refinement_measured"] for one in others} == {None}
    assert [one["part"] for one in budget["trainings"]] == ["super-network", "refinement"]
    assert budget["together"]["flops"] == FIRST.flops + done.flops


def test_planned_refinements_stand_beside_one_that_was_done() -> None:
    done = alone("L4", 6, before=(FIRST,))
    planned = [(parse_name(SHAPE, name), 700) for name in ("L4", "k1")]
    rows = make_budget(done, planned)["networks"]
    assert [(r["name"], r["refinement_tokens"], r["refinement_done"]) for r in rows] == [
        ("L4", done.tokens, True),
        ("L4", 700, False),
        ("k1", 700, False),
    ]
    (first, second) = make_budget(FIRST, planned)["networks"]
    assert [rows[1], rows[2]] == [first, second]


def test_a_refinement_in_two_trainings_is_one_row_of_both() -> None:
    one = alone("L4", 6, before=(FIRST, alone("L4", 5, seconds=2.0, timed_steps=5)))
    budget = make_budget(one)
    assert budget["super_network"]["flops"] == FIRST.flops
    row = budget["networks"][0]
    assert row["refinement_flops"] == one.flops + one.before[1].flops
    assert row["refinement_tokens"] == one.tokens + one.before[1].tokens
    assert row["refinement_measured"] == {
        "seconds": 2.0,
        "timed_steps": 5,
        "flops_per_second": None,
    }


@pytest.mark.parametrize(
    ("last", "kind"),
    [
        (alone("full", 6, before=(FIRST,)), None),
        (alone("L6", 6, before=(FIRST,)), None),  # all of its layers
        (replace(THIRD, before=(FIRST, alone("L4", 6))), None),  # and went on elastically
        (alone("L4", 6), "L4"),  # nothing that it refined is known
    ],
)
def test_what_is_no_refinement_counts_as_the_super_network(
    last: Training, kind: str | None
) -> None:
    budget = make_budget(last)
    parts = [*last.before, last]
    assert budget["super_network"]["flops"] == sum(part.flops for part in parts)
    assert {one["part"] for one in budget["trainings"]} == {"super-network"}
    assert not any(row["refinement_done"] for row in budget["networks"])
    assert budget["super_network"]["alone"] == kind
