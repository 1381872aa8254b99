"""The page of claims is what the committed results say, and nothing of it is typed in."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.errors import BenchmarkError
from elastic_moe.lab.cost.budget import make_budget
from elastic_moe.lab.cost.training import read_training
from elastic_moe.lab.view.frontier import format_si
from elastic_moe.model.checkpoints.folder import BUNDLED
from elastic_moe.model.checkpoints.weights import WEIGHTS, file_sha256
from elastic_moe.routing import parse_name
from experiments.claims import page as claims
from experiments.claims.page import CLAIMS, PAGE, iteration, main, nothing, page
from experiments.claims.results import NOT_YET, RESULTS, SWEEP, TEXT, Results
from experiments.science.summary import PUBLISHED, PUBLISHED_COST_AT_FULL

OTHER = "ab" * 32  # weights that are not the bundled ones

FILES = ("elastic-mini.jsonl", "peers.jsonl", "sweep-elastic-mini.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The committed results without those of the science, as if of the weights that are bundled."""
    for name in FILES:
        shutil.copy(RESULTS / name, tmp_path)
    weights = file_sha256(BUNDLED / "elastic-mini" / WEIGHTS)
    change_lines(tmp_path, "elastic-mini.jsonl", lambda line: line.update(weights_sha256=weights))
    change_sweep(tmp_path, lambda sweep: sweep["settings"].update(weights_sha256=weights))
    return tmp_path


def change_lines(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    for line in lines:
        change(line)
    (folder / name).write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def change_sweep(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    sweep = json.loads((folder / SWEEP).read_text())
    change(sweep)
    (folder / SWEEP).write_text(json.dumps(sweep))


def rows(text: str) -> list[list[str]]:
    """The cells of the table, without its header."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines[1:]]


def over_seeds(mean: float, sd: float | None = 0.01, n: int = 3) -> dict[str, Any]:
    return {"n": n, "mean": mean, "sd": sd}


def summary() -> dict[str, Any]:
    """The last line of a science.jsonl, whose every mean is another number."""
    points = {}
    for index, name in enumerate(("full", "k2", "k1", "L9", "L6", "p8", "w4")):
        points[name] = {
            "lost": {
                "elastic": over_seeds(1 + index / 100),
                "inelastic": over_seeds(2 + index / 100),
                "drawn": over_seeds(5 + index / 100, None, 1),
            },
            "drawn_cost": over_seeds(6 + index / 100, None, 1),
            "elastic_gain": compared(3 + index / 100),
            "frugal_gain": compared(7 + index / 100),
            "specialist_gain": over_seeds(4 + index / 100, None, 1),
        }
    texts = {TEXT: {"points": points}}
    return {"kind": "summary", "case": "summary", "tokens": 9_998_336, "texts": texts}


def compared(mean: float, seed_sd: float = 0.07) -> dict[str, Any]:
    """A difference of two families, whose pairs differ less than runs of different seeds do."""
    return over_seeds(mean) | {"seed_sd": seed_sd}


def write_science(folder: Path, line: dict[str, Any]) -> None:
    lines = [{"kind": "run", "case": "elastic-0"}, line]
    (folder / "science.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in lines))


def test_the_committed_page_is_what_the_results_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(Results())


def test_check_finds_a_page_that_is_out_of_date(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(claims, "PAGE", tmp_path / "CLAIMS.md")
    monkeypatch.setattr(claims, "RESULTS", folder)
    monkeypatch.setattr(sys, "argv", ["claims", "--check"])
    assert main() == 1
    monkeypatch.setattr(sys, "argv", ["claims"])
    assert main() == 0
    monkeypatch.setattr(sys, "argv", ["claims", "--check"])
    assert main() == 0
    (tmp_path / "CLAIMS.md").write_text("old")
    assert main() == 1
    assert "is out of date" in capsys.readouterr().out
    change_lines(folder, "elastic-mini.jsonl", lambda line: line.update(weights_sha256=OTHER))
    assert main() == 1
    assert "error: " in (reported := capsys.readouterr()).err
    assert reported.out == ""


# --- one set of weights, one text


def as_coherence(folder: Path, *cases: tuple[str, str]) -> None:
    lines = [json.dumps({"case": case, "weights_sha256": weights}) for case, weights in cases]
    (folder / "coherence.jsonl").write_text("".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (
            "elastic-mini.jsonl",
            lambda folder: change_lines(
                folder, "elastic-mini.jsonl", lambda line: line.update(weights_sha256=OTHER)
            ),
        ),
        (
            SWEEP,
            lambda folder: change_sweep(
                folder, lambda sweep: sweep["settings"].update(weights_sha256=OTHER)
            ),
        ),
        ("coherence.jsonl", lambda folder: as_coherence(folder, ("elastic-mini", OTHER))),
    ],
)
def test_what_was_measured_on_other_weights_is_refused_and_both_are_named(
    name: str, change: Callable[[Path], None], folder: Path
) -> None:
    bundled = file_sha256(BUNDLED / "elastic-mini" / WEIGHTS)
    as_coherence(folder, ("elastic-mini", OTHER), ("elastic-mini", bundled), ("12 layers", OTHER))
    Results(folder)  # of several lines the last one counts, and those of other models do not
    change(folder)
    with pytest.raises(BenchmarkError) as error:
        Results(folder)
    for words in (name, "weights abababababab...", f"bundled elastic-mini are {bundled[:12]}..."):
        assert words in str(error.value)


def test_a_sweep_that_names_no_weights_is_refused(folder: Path) -> None:
    change_sweep(folder, lambda sweep: sweep["settings"].pop("weights_sha256"))
    with pytest.raises(BenchmarkError, match="on weights that it does not name"):
        Results(folder)


@pytest.mark.parametrize("key", ["name", "sha256"])
def test_a_sweep_of_another_text_is_refused(key: str, folder: Path) -> None:
    change_sweep(folder, lambda sweep: sweep["corpus"].update({key: "another-text"}))
    with pytest.raises(
        BenchmarkError, match=f"scored the text .*another-text.*, .* beside it {TEXT}"
    ):
        Results(folder)


def test_the_page_says_how_many_tokens_each_figure_is_over_where_they_differ(folder: Path) -> None:
    scored = Results(folder).scored_tokens
    for swept, reported in ((4_096, True), (scored, False)):
        change_sweep(folder, lambda sweep, n=swept: sweep["corpus"].update(scored_tokens=n))
        text = page(Results(folder))
        assert f"over\n  {scored:,} scored tokens" in text
        assert ("scored tokens, unless a row gives another number." in text) == reported
        assert ("`t0.5` in the sweep, 4,096 tokens scored: " in text) == reported


# --- what is published


def test_the_figures_of_the_ablation_are_those_of_the_science() -> None:
    published = [claim.published for claim in CLAIMS]
    for point in PUBLISHED.values():
        assert f"{point['what']} costs {point['lost']:+.3f}" in published
    typed = Path(claims.__file__).read_text(encoding="utf-8")
    (at_full,) = (text for text in published if text.startswith("at full budget"))
    for figure in (*PUBLISHED_COST_AT_FULL, *(point["lost"] for point in PUBLISHED.values())):
        assert f"{abs(figure):.3f}" not in typed
    for cost in PUBLISHED_COST_AT_FULL:
        assert f"{cost:+.3f}" in at_full


def test_the_share_of_an_iteration_is_told_of_both_bases(folder: Path) -> None:
    text = iteration(Results(folder))
    training = read_training("elastic-mini")
    chosen = parse_name(training.shape, "L24-k2")
    shares = []
    for base in ("S", "F"):
        ((number, prefix),) = re.findall(rf"6 % of {base} is ([\d.]+) ([kM])", text)
        count = round(float(number) * {"k": 1e3, "M": 1e6}[prefix])
        shares.append(make_budget(training, [(chosen, count)])["networks"][0])
    assert shares[0]["refinement_of_scratch"] == pytest.approx(0.06, rel=0.01)
    ((number, prefix),) = re.findall(r"and 6 % of it ([\d.]+) ([kM])", text)
    count = round(float(number) * {"k": 1e3, "M": 1e6}[prefix])
    ungrown = make_budget(training, [(chosen, count)])["networks"][0]
    assert ungrown["refinement_flops"] == pytest.approx(
        0.06 * ungrown["ungrown_scratch_flops"], rel=0.01
    )
    reported = format_si(ungrown["ungrown_scratch_flops"], "FLOP")
    assert f"with all its layers from the first step on it is {reported}," in text
    assert shares[1]["refinement_of_super_network"] == pytest.approx(0.06, rel=0.01)
    assert f"S, {format_si(shares[0]['scratch_flops'], 'FLOP')};" in text
    (claim,) = (claim for claim in CLAIMS if claim.measured is iteration)
    assert "nor the base of the share is published" in claim.reading
    for identity in ("106", "18 %", "18.5"):  # 1 + 0.06, 1 / 8 + 0.06
        assert identity not in text


def test_every_row_has_a_source_and_says_what_cannot_be_had_here(folder: Path) -> None:
    for claim in CLAIMS:
        assert re.search(r"\[.+\]\(https://.+\)", claim.source)
        assert "|" not in claim.published + claim.reading
        if claim.measured is nothing:
            assert "not reproducible here" in claim.reading
    assert all(len(cells) == 4 for cells in rows(page(Results(folder))))
    cited = " ".join(claim.source for claim in CLAIMS)
    for number in ("2602.04705", "2310.07707", "2602.06154", "2402.14800", "1903.05134"):
        assert number in cited


def test_what_is_not_measured_yet_says_so(folder: Path) -> None:
    text = page(Results(folder))
    assert f"single sub-networks: {NOT_YET}" in text
    measured = {cells[1]: cells[2] for cells in rows(text)}
    with_science = [what for what, cell in measured.items() if NOT_YET in cell]
    assert len(with_science) == 7
    assert any("depth 16 -> 12" in what for what in with_science)


def test_every_figure_of_the_science_has_its_place(folder: Path) -> None:
    write_science(folder, summary())
    text = page(Results(folder))
    assert NOT_YET not in text
    assert "single sub-networks: 10.0 M tokens each" in text
    for figure in (
        "12 layers `k2`: +1.010 ± 0.010 (3 seeds); one network a step: +5.010 (1 seed); inel",
        "(1 seed); inelastic: +2.010 ± 0.010 (3 seeds)",
        "12 layers `k1`: +1.020",
        "12 layers `L9`: +1.030",
        "12 layers `p8`: +1.050",
        # A gain of 3 is a cost of -3; its deviation is that of two different seeds.
        "whole network: -3.000 ± 0.070 (3 seeds), frugal: -7.000 ± 0.070 (3 seeds); one network",
        "one network a step, as there: +6.000 (1 seed)",
        "half the width -3.060",
        "`L9` +4.030 (1 seed)",
        "`p8` +4.050 (1 seed)",
    ):
        assert figure in text, figure


def test_what_the_science_has_not_finished_is_not_measured_yet(folder: Path) -> None:
    line = summary()
    points = line["texts"][TEXT]["points"]
    points["k2"]["lost"] = {"elastic": None, "inelastic": None}
    points["L9"]["lost"] |= {"inelastic": None, "drawn": None}
    points["p8"]["specialist_gain"] = None
    points["full"]["elastic_gain"] = over_seeds(0.0, None, 0)
    write_science(folder, line)
    text = page(Results(folder))
    assert f"12 layers `k2`: {NOT_YET} |" in text
    assert f"12 layers `L9`: +1.030 ± 0.010 (3 seeds); inelastic: {NOT_YET} |" in text
    assert f"`p8` {NOT_YET}" in text
    assert f"whole network: {NOT_YET}" in text


def other_quality(folder: Path) -> None:
    other = {"nats_lost": 0.7654, "standard_error": 0.0321}
    change_lines(folder, "elastic-mini.jsonl", lambda line: line["points"]["k2"].update(other))


def other_sweep(folder: Path) -> None:
    def change(sweep: dict[str, Any]) -> None:
        for point in sweep["points"]:
            point |= {"mean_experts": 1.25, "delta_nats": 0.5, "standard_error": 0.25}
            point |= {"flops_per_token": 905 if point["name"] == "t0.5" else 1000}

    change_sweep(folder, change)


def other_peers(folder: Path) -> None:
    def change(line: dict[str, Any]) -> None:
        for one in line["rounds"]:
            one["other"] |= {"full seconds": 3.0, "k2 seconds": 2.0}

    change_lines(folder, "peers.jsonl", change)


@pytest.mark.parametrize(
    ("change", "figure", "changed"),
    [
        (other_quality, "elastic-mini `k2`: +0.765 ± 0.032", 1),
        (other_sweep, "1.25 of 1 experts run, 90.5 % of the FLOPs, +0.500 ± 0.250", 1),
        (other_peers, "k 8 -> 2 decodes 50 % faster", 1),
    ],
)
def test_what_was_measured_comes_from_the_results(
    change: Callable[[Path], None], figure: str, changed: int, folder: Path
) -> None:
    before = rows(page(Results(folder)))
    change(folder)
    text = page(Results(folder))
    assert figure in text
    assert sum(a != b for a, b in zip(before, rows(text), strict=True)) == changed
