"""`elastic-moe budget`: its table, its JSON, and what it refuses."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.cli import main
from elastic_moe.cli.budget import EXAMPLES
from elastic_moe.lab.cost.training import read_training
from elastic_moe.lab.view.frontier import format_percent, format_si
from elastic_moe.train.step.plan import parse_stages
from elastic_moe.train.step.sampling import SamplingPlan
from tests.train.tiny import PLAN, trainer


def ledger(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["budget", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def words(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is printed, in one line."""
    assert main(["budget", *arguments]) == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run of two steps that took 0.5 s each."""
    (tmp_path / "later").mkdir()
    done = trainer(replace(PLAN, sampling=SamplingPlan(fixed="full")))
    done.train_step()
    done.train_step()
    done.save(tmp_path / "state.safetensors")
    (tmp_path / "log.jsonl").write_text(
        "".join(f'{{"step": {step}, "seconds": 0.5}}\n' for step in (1, 2))
    )
    return tmp_path


def test_the_table_shows_what_the_json_says(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--refine", "L24-k2:200k", "--refine", "p8", "--networks", "6"]
    found = ledger(capsys, *arguments)
    assert main(["budget", "elastic-mini", *arguments]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    rows = [re.split(r"\s\s+", line.strip()) for line in out.splitlines()]
    header = next(row for row in rows if row[0] == "network")
    assert header == [
        *(
            "network",
            "tokens",
            "refinement",
            "n=1",
            "n=2",
            "n=4",
            "n=6",
            "from scratch",
            "pays from",
        )
    ]
    for name, refined, row in (
        ("L24-k2", ["200 k"], found["networks"][0]),
        ("p8", [], found["networks"][1]),
        ("mean", [], found["mean"]),
    ):
        shares = [
            row["refinement_of_super_network"],
            *(one["of_super_network"] for one in row["shared"]),
            row["scratch_of_super_network"],
        ]
        least = f"n={row['break_even_networks']}"
        assert [name, *refined, *(f"{100 * share:.1f}" for share in shares), least] in rows
    trained, reported = found["super_network"], " ".join(out.split())
    assert format_si(trained["flops"], "FLOP") in reported
    assert (
        f"{format_percent(1 - trained['of_inelastic'], 1)} less than an inelastic run" in reported
    )
    assert f"These 2 cost {format_si(found['together']['flops'], 'FLOP')}" in reported
    assert "Time: not measured." in reported
    assert "Equal tokens do not make equal quality" in reported


def test_a_refinement_is_put_in_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = ledger(capsys, "--refine", "L24:100k", "--networks", "4")["networks"]
    last = row["shared"][-1]
    of_existing, of_scratch, of_one, of_total = (
        format_percent(ratio, 1)
        for ratio in (
            row["refinement_of_super_network"],
            row["refinement_flops"] / row["scratch_flops"],
            last["of_super_network"],
            last["refinement_of_total"],
        )
    )
    assert (
        f"Refining L24 costs {of_existing} of an existing super-network, and {of_scratch} of "
        f"training L24 from scratch. When 4 networks bear the super-network's cost, L24 costs "
        f"{of_one} of it in all, of which refinement is {of_total}."
    ) in words(capsys, "--refine", "L24:100k", "--networks", "4")
    assert last["of_super_network"] == pytest.approx(0.25 + row["refinement_of_super_network"])


def test_from_scratch_is_told_as_it_grows_and_as_it_does_not(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budget = ledger(capsys, "--refine", "L24-k2", "--refine", "L12")
    deep, shallow = budget["networks"]
    flops = budget["super_network"]["flops"]
    assert deep["ungrown_scratch_flops"] > deep["scratch_flops"]
    reported = words(capsys, "--refine", "L24-k2", "--refine", "L12")
    shares = ", ".join(
        f"{row['name']} {format_percent(row['ungrown_scratch_flops'] / flops, 1)}"
        for row in (deep, shallow)
    )
    assert (
        f"From scratch grows as the super-network did; with all layers from the first step on: "
        f"{shares}."
    ) in reported
    assert "Pays from: so many networks cost less by extracting them" in reported
    done = trainer(replace(PLAN, stages=parse_stages("6x8x1x128")))
    done.train_step()
    done.save(run_folder / "state.safetensors")
    assert "From scratch grows" not in words(capsys, str(run_folder))  # as it never did


def test_a_network_that_has_not_grown_says_so(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "NOT GROWN: 2 of its 6 layers have run so far" in words(capsys, str(run_folder))
    done = trainer(PLAN)
    for _ in range(7):
        done.train_step()
    done.save(run_folder / "state.safetensors")
    assert "NOT GROWN" not in words(capsys, str(run_folder))


def test_extraction_alone_is_put_in_its_place_too(capsys: pytest.CaptureFixture[str]) -> None:
    reported = words(capsys, "--networks", "40")
    assert (
        "costs 0 % of an existing super-network, and 2.5 % of it when 40 networks bear" in reported
    )


def test_a_network_that_never_pays_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    reported = words(capsys, "--refine", "L24:1G")
    assert " never" in reported
    assert "…" not in reported
    (row,) = ledger(capsys, "--refine", "L24:1G")["networks"]
    assert row["break_even_networks"] is None


def test_many_networks_leave_the_table_narrow(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budget", "--networks", "1000"]) == 0
    out = capsys.readouterr().out
    assert "n=1,000" in out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 100
    assert [one["networks"] for one in ledger(capsys, "--networks", "1000")["mean"]["shared"]] == [
        *(2**i for i in range(10)),
        1000,
    ]


def test_a_run_tells_the_time_that_it_took(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = ledger(capsys, str(run_folder))["super_network"]
    assert found["measured"] == {
        "seconds": 1.0,
        "timed_steps": 2,
        "flops_per_second": found["flops"],
    }
    reported = words(capsys, str(run_folder))
    assert f"{run_folder.name} (run): 2 of 14 steps, 1.02 k tokens" in reported
    assert f"Measured: 1.0 s, {format_si(found['flops'], 'FLOP')}/s." in reported
    assert "That is as much as an inelastic run" in reported
    (run_folder / "log.jsonl").write_text('{"step": 2, "seconds": 0.5}\n')
    assert "Measured: 0.5 s in 1 of the steps." in words(capsys, str(run_folder))


def test_distillation_is_told_apart(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = trainer(replace(PLAN, distill=0.5, sampling=SamplingPlan(full=0.0)))
    done.train_step()
    done.save(run_folder / "state.safetensors")
    found = ledger(capsys, str(run_folder))["super_network"]
    share = format_percent(found["distillation_flops"] / found["flops"], 1)
    assert found["distillation_flops"] > 0
    assert f"Distilling took {share}." in words(capsys, str(run_folder))


def test_a_run_that_went_on_from_another_says_what_is_not_counted(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = trainer(PLAN)
    later.adopt(dict(trainer(PLAN).model.named_parameters()), "first sha256:ab")
    later.train_step()
    later.save(tmp_path / "later" / "state.safetensors")
    second = str(tmp_path / "later")
    assert "NOT COUNTED: the training of first sha256:ab" in words(capsys, second)
    both = words(capsys, second, "--began-with", str(run_folder))
    assert "NOT COUNTED" not in both
    assert f"{run_folder.name} (run): 2 of 14 steps" in both
    assert "later (run): 1 of 14 steps" in both
    found = ledger(capsys, second, "--began-with", str(run_folder))
    assert f"together: 1.54 k tokens, {format_si(found['super_network']['flops'], 'FLOP')}" in both
    assert main(["budget", second, "--began-with", "elastic-mini"]) == 2


@pytest.fixture
def refined(run_folder: Path) -> Path:
    """Three steps of L3 alone that went on from the run, whose manifest was kept."""
    plan = replace(PLAN, sampling=SamplingPlan(fixed="L3"))
    later = trainer(plan)
    later.adopt(dict(trainer(plan).model.named_parameters()), "first sha256:ab")
    for _ in range(3):
        later.train_step()
    folder = run_folder / "later"
    later.save(folder / "state.safetensors")
    (folder / "log.jsonl").write_text(
        "".join(f'{{"step": {step}, "seconds": 0.25}}\n' for step in (1, 2, 3))
    )
    began = read_training(run_folder)
    reported = {"plan": began.plan.to_json(), "steps": began.steps, "flops": began.flops}
    manifest = {"corpus": {}, "training": reported | {"tokens": began.tokens, "parent": None}}
    (folder / "parent-manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_refinement_that_was_done_is_marked_and_timed(
    refined: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, alone = ledger(capsys, str(refined)), ledger(capsys, str(run_folder))
    assert found["super_network"] == alone["super_network"] | {"measured": None}
    row = found["networks"][0]
    assert main(["budget", str(refined)]) == 0
    out = capsys.readouterr().out
    reported = " ".join(out.split())
    assert "training 1 of 2 (parent): 2 of 14 steps, 1.02 k tokens, " in reported
    flops = format_si(row["refinement_flops"], "FLOP")
    assert f"later (run): 3 of 14 steps, 1.54 k tokens, {flops}: refining L3 alone" in reported
    assert "NOT COUNTED" not in reported
    share = format_percent(row["refinement_of_super_network"], 1)
    assert (
        f"Refining L3 costs {share} of an existing super-network, and "
        f"{format_percent(row['refinement_of_scratch'], 1)} of training L3 from scratch. It was "
        f"done. Measured: 0.8 s, " in reported
    )
    rows = [re.split(r"\s\s+", line.strip()) for line in out.splitlines()]
    (cells,) = [cells for cells in rows if cells[0].startswith("L3 ") or cells[0] == "L3"]
    assert cells[:3] == ["L3 (done)", "1.54 k", f"{100 * row['refinement_of_super_network']:.1f}"]


def test_a_training_counts_once_however_often_it_is_named(
    refined: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    once = ledger(capsys, str(refined))
    twice = ledger(capsys, str(refined), "--began-with", str(run_folder))
    assert twice["networks"] == once["networks"]
    assert [one["name"] for one in twice["trainings"]] == [run_folder.name, "later"]
    assert twice["super_network"]["measured"]["seconds"] == 1.0
    assert main(["budget", str(run_folder), "--began-with", str(refined)]) == 2
    assert "itself, or went on from it" in capsys.readouterr().err


def test_a_sub_network_trained_alone_says_that_it_is_no_super_network(
    refined: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (refined / "parent-manifest.json").unlink()
    reported = words(capsys, str(refined))
    assert "NOT COUNTED: the training of first sha256:ab" in reported
    assert "Every step trained L3 alone: what is called a super-network here is this" in reported


def test_what_costs_more_than_an_inelastic_run_says_so(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = trainer(replace(PLAN, sandwich=True, sampling=SamplingPlan()))
    done.train_step()
    done.save(run_folder / "state.safetensors")
    ratio = ledger(capsys, str(run_folder))["super_network"]["of_inelastic"]
    assert ratio > 1
    reported = words(capsys, str(run_folder))
    assert f"{format_percent(ratio - 1, 1)} more than an inelastic run" in reported


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("7", 7), ("200k", 200_000), ("1.5M", 1_500_000), ("2B", 2 * 10**9), ("0.3G", 300_000_000)],
)
def test_tokens_may_have_a_unit(text: str, tokens: int, capsys: pytest.CaptureFixture[str]) -> None:
    found = ledger(capsys, "--refine", f"k1:{text}", "--scratch-tokens", text)
    assert found["networks"][0]["refinement_tokens"] == found["scratch_tokens"] == tokens


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--refine", "L99"], "depth must be an integer in [1, 48], got 99"),
        (["--refine", "nonsense:1M"], "'nonsense' is no sub-network name"),
        (["--refine", ""], "is no sub-network name"),
        (["no/such/folder"], "'no/such/folder' is neither the folder of a training run"),
    ],
)
def test_what_does_not_fit_is_a_bad_argument(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["budget", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--refine", "L24:many"], "tokens must be a number such as 200000, 200k or 1.5M"),
        (["--refine", "L24:-5"], "got '-5'"),
        (["--refine", "L24:0.4"], "tokens must be a whole number, got '0.4'"),
        (["--scratch-tokens", "1.0005k"], "tokens must be a whole number, got '1.0005k'"),
        (["--scratch-tokens", "0"], "tokens must be at least 1, got '0'"),
        (["--networks", "0"], "must be an integer in [1, 1,000,000,000], got '0'"),
        (["--networks", "-3"], "must be an integer in [1, 1,000,000,000], got '-3'"),
        (["--networks", "²"], "must be an integer in [1, 1,000,000,000], got '²'"),
        (["--networks", "1000000001"], "[1, 1,000,000,000], got '1000000001'"),
        (["--networks", f"1{320 * '0'}"], "[1, 1,000,000,000], got 321 characters"),
        (["--networks", 5000 * "9"], "[1, 1,000,000,000], got 5,000 characters"),
    ],
)
def test_a_number_that_is_none_is_a_bad_argument(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(["budget", *arguments])
    assert done.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_folders_of_other_kinds_are_bad_arguments_and_damaged_ones_failures(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["budget", str(tmp_path)]) == 2
    assert main(["budget", str(tiny_folder)]) == 2
    (tmp_path / "state.safetensors").write_bytes(b"half")
    assert main(["budget", str(tmp_path)]) == 1
    assert "is no training state" in capsys.readouterr().err
    (tmp_path / "state.safetensors").unlink()
    shutil.copy(tiny_folder / "config.json", tmp_path)
    for torn in ('{"training": {"plan": ', '{"training": {"plan": {"sampling": {}, "epochs": 3}}}'):
        (tmp_path / "manifest.json").write_text(torn)
        assert main(["budget", str(tmp_path)]) == 1
        assert "manifest.json" in capsys.readouterr().err


def test_what_was_extracted_and_trained_on_is_a_refinement_of_the_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "text.txt").write_text("It was the best of times, it was the worst. " * 3000)
    sizes = ["--corpus", str(corpus), "--batch-tokens", "512", "--length", "128"]
    whole, part, on = (str(tmp_path / name) for name in ("whole", "part", "on"))
    small = ["--layers", "4", "--hidden", "32", "--experts", "4", "--vocab-size", "300"]
    assert main(["train", *sizes, *small, "--tokens", "4096", "--out", whole]) == 0
    assert main(["extract", f"{whole}/checkpoint", "L2", "--out", part]) == 0
    assert main(["train", "--from", part, *sizes, "--tokens", "2048", "--out", on]) == 0
    capsys.readouterr()

    first, found = ledger(capsys, whole), ledger(capsys, on)
    last = read_training(on)
    assert found["super_network"]["flops"] == first["super_network"]["flops"]
    assert found["super_network"]["uncounted"] is None
    assert [one["part"] for one in found["trainings"]] == ["super-network", "refinement"]
    row = found["networks"][0]
    assert (row["name"], row["refinement_done"]) == ("L2", True)
    assert (row["refinement_flops"], row["refinement_tokens"]) == (last.flops, 2048)
    two = next(one for one in first["networks"] if one["name"] == "L2")
    assert row["scratch_flops"] == two["scratch_flops"]
    reported = words(capsys, on)
    assert "NOT COUNTED" not in reported
    assert "on (run): 4 of 4 steps" in reported
    assert "training what was extracted, L2" in reported

    # What it can be extracted as is of the whole; naming the whole changes nothing but its name.
    assert ledger(capsys, on, "--refine", "L3:1k")["networks"][1]["name"] == "L3"
    named = ledger(capsys, on, "--began-with", whole)
    assert named["networks"] == found["networks"]
    assert named["trainings"][0]["name"] == "whole"
    assert ledger(capsys, part)["networks"][0]["name"] == "L2"
    again = ledger(capsys, f"{on}/checkpoint")
    assert (again["networks"], again["trainings"][1]["kind"]) == (
        [row | {"refinement_measured": None}, *found["networks"][1:]],
        "checkpoint",
    )


def test_a_training_that_it_did_not_come_from_is_refused(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    done = trainer(replace(PLAN, seed=5))
    done.train_step()
    other.mkdir()
    done.save(other / "state.safetensors")
    assert main(["budget", str(run_folder), "--began-with", str(other)]) == 2
    assert "began with random weights, so that it cannot have gone on" in capsys.readouterr().err


def test_the_examples_are_understood(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.strip().split("  ")[0] for line in EXAMPLES.splitlines()[1:]]
    for line in lines:
        command, subcommand, *arguments = shlex.split(line)
        assert (command, subcommand) == ("elastic-moe", "budget")
        there = [w for w in arguments if w not in ("runs/mini", "path/to/checkpoint")]
        assert main(["budget", *there]) == 0
        capsys.readouterr()
