"""Measure the networks of the experiment, and say what they say together.

    python -m experiments.science.evaluate --runs runs/science --novels DIR \\
        --out benchmarks/results/science.jsonl

One line per finished run and one summary. What --out has already is kept: the line of a run whose
checkpoint is not here any more, and, unless --again, the line of a checkpoint that was measured on
the same texts before. So runs can be trained and measured over several days and machines. The
summary says how many seeds each number has: a bar is met or missed with three seeds of both sides,
undecided before. Exits 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from elastic_moe.engine import Engine
from elastic_moe.errors import BenchmarkError, ElasticMoEError
from elastic_moe.files import write_text
from elastic_moe.lab.provenance import describe_provenance
from elastic_moe.lab.sweeps.quality import Quality, window_sums
from elastic_moe.lab.sweeps.text import EvaluationSet
from elastic_moe.model.checkpoints.folder import read_json
from elastic_moe.train.runs.log import read_log
from elastic_moe.train.step.plan import completed
from elastic_moe.train.step.state import FREE
from experiments.science.measuring import (
    TOKENS,
    Bundles,
    describe_loss,
    describe_quality,
    evaluation_texts,
    measure,
)
from experiments.science.runs import (
    CHECKPOINT,
    RECIPE,
    RUNS,
    SESSIONS,
    SPECIALISTS,
    Run,
    is_finished,
)
from experiments.science.summary import POINTS, Line, summarise

# One pass over the deepest of each gives all its depths.
BUNDLES: Bundles = {"full": (12, 9, 6), "k2": (12,), "k1": (12,), "p8": (12,), "w4": (12,)}
SPECIAL: dict[str, Bundles] = {"depth9": {"L9": (9,)}, "pool8": {"p8": (12,)}}

Texts = Mapping[str, EvaluationSet]
Measured = Mapping[str, Mapping[str, Quality]]  # of one run: text -> point -> quality


def evaluate(run: Run, engine: Engine, texts: Texts) -> Measured:
    """Quality at every point of the run, on every text; a specialist has its own point alone."""
    bundles = SPECIAL.get(run.family, BUNDLES)
    found = {name: measure(engine, text, bundles) for name, text in texts.items()}
    expected = [SPECIALISTS[run.family]] if run.family in SPECIALISTS else list(POINTS)
    return {name: {point: found[name][point] for point in expected} for name in found}


def describe_run(
    run: Run, folder: Path, engine: Engine, measured: Measured, texts: Texts
) -> dict[str, Any]:
    """The line of one run."""
    manifest = json.loads((folder / CHECKPOINT / "manifest.json").read_text(encoding="utf-8"))
    training, corpus, shape = manifest["training"], manifest["corpus"], engine.shape
    noted = folder / SESSIONS  # may be missing where checkpoint and log came from elsewhere
    sittings = noted.read_text(encoding="utf-8").splitlines() if noted.is_file() else []
    devices = dict.fromkeys(json.loads(sitting)["device"] for sitting in sittings)
    results = {}
    for name, text in texts.items():
        points = {}
        for point, quality in measured[name].items():
            full = measured[name].get("full")
            loss = dict.fromkeys(("nats_lost", "standard_error", "kl_to_full", "top1_agreement"))
            if full is not None:
                loss = describe_loss(quality, full, text)
            counts = [window.scored for window in text.windows]
            windows = (window_sums(quality, text) / counts).round(5).tolist()
            points[point] = describe_quality(quality, text) | loss | {"window_nats": windows}
        results[name] = {"corpus": text.describe(), "window_tokens": counts, "points": points}
    return {
        "benchmark": "science",
        "kind": "run",
        "case": run.name,
        "family": run.family,
        "seed": run.seed,
        "model": {
            "model_type": engine.config.model_type,
            "num_layers": shape.num_layers,
            "hidden_size": shape.hidden_size,
            "num_experts": shape.num_experts,
            "max_top_k": shape.max_top_k,
            "expert_hidden": shape.expert_hidden,
            "total_params": shape.total_params,
        },
        "training": {
            "steps": training["steps"],
            "tokens": training["tokens"],
            "flops": training["flops"],
            "plan": training["plan"],
            "seconds": round(sum(record["seconds"] for record in read_log(folder)), 1),
            "device": ", ".join(devices) or None,
        },
        "data": {
            "corpus_sha256": engine.config.elastic.corpus_sha256 if engine.config.elastic else None,
            "stream_sha256": corpus["stream_sha256"],
            "stream_tokens": corpus["stream_tokens"],
        },
        "weights_sha256": engine.weights_sha256,
        "dtype": engine.dtype,
        "backend": engine.backend,
        "texts": results,
    }


def differences(a: Line, b: Line) -> Iterator[tuple[str, Any, Any]]:
    """(what, a's, b's) of everything in which two runs have to be alike, and are not."""
    plans = [completed(line["training"]["plan"], line["case"]) for line in (a, b)]
    for plan in plans:
        for field in {"seed", *FREE}:
            plan.pop(field, None)
        if a["family"] != b["family"]:
            for field in RECIPE:
                plan.pop(field)
    ours, theirs = (
        {f"plan.{field}": value for field, value in plan.items()}
        | {f"model.{field}": value for field, value in line["model"].items()}
        | {
            f"{name}.{field}": value
            for name, text in line["texts"].items()
            for field, value in text["corpus"].items()
        }
        | {"stream_sha256": line["data"]["stream_sha256"], "steps": line["training"]["steps"]}
        | {"dtype": line["dtype"], "backend": line["backend"]}
        for plan, line in zip(plans, (a, b), strict=True)
    )
    for what in sorted(ours.keys() | theirs.keys()):
        if ours.get(what) != theirs.get(what):
            yield what, ours.get(what), theirs.get(what)


def check_comparable(lines: Sequence[Line]) -> None:
    """Refuse runs that did not read, learn or get measured the same.

    Raises:
        BenchmarkError: names two runs, and what differs.
    """
    for at, line in enumerate(lines):
        same_family = (other for other in lines[:at] if other["family"] == line["family"])
        first = next(same_family, lines[0])
        for what, ours, theirs in differences(line, first):
            raise BenchmarkError(
                f"{line['case']} and {first['case']} cannot be compared: {what} is {ours} and "
                f"{theirs}. Train and measure them alike, or name another --out."
            )


def read_runs(path: Path | None) -> dict[str, Line]:
    """The lines of runs that a file of results has, by name.

    Raises:
        BenchmarkError: a line has not what the summary is made of.
    """
    if path is None or not path.is_file():
        return {}
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    runs = {line["case"]: line for line in found if line["kind"] == "run"}
    for case, line in runs.items():
        if not all("window_tokens" in text for text in line["texts"].values()):
            raise BenchmarkError(
                f"{path}: the line of {case} has no losses by window, so nothing can be compared "
                f"with it. Move the file away and measure again."
            )
        had = completed(line["training"]["plan"], f"{path}: {case}")
        wanted = completed(Run(line["family"], line["seed"]).plan().to_json(), case)
        for field in RECIPE:
            if had[field] != wanted[field]:
                raise BenchmarkError(
                    f"{path}: {case} was trained with {field} = {had[field]!r}, which for "
                    f"{line['family']} is now {wanted[field]!r}. Move the line away, or call it "
                    f"what it is."
                )
    return runs


def is_of(line: Line, engine: Engine, texts: Texts) -> bool:
    """Whether the line was measured on this checkpoint, these texts and this dtype."""
    corpora = {name: result["corpus"] for name, result in line["texts"].items()}
    return (
        line["weights_sha256"] == engine.weights_sha256
        and line["dtype"] == engine.dtype
        and corpora == {name: text.describe() for name, text in texts.items()}
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, required=True, help="--out of the training")
    parser.add_argument("--novels", type=Path, required=True, help="with the held-out authors")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="scored (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the results to this .jsonl file")
    parser.add_argument("--again", action="store_true", help="measure what --out has as well")
    args = parser.parse_args()
    try:
        return _evaluate_all(args.runs, args.novels, args.tokens, args.out, args.again)
    except (ElasticMoEError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


def _evaluate_all(folder: Path, novels: Path, tokens: int, out: Path | None, again: bool) -> int:
    about = {
        **describe_provenance(),
    }
    known = read_runs(out)
    texts: dict[str, EvaluationSet] = {}
    for run in RUNS:
        checkpoint = folder / run.name / CHECKPOINT
        if not (checkpoint / "manifest.json").is_file():
            if run.name in known:
                _say(f"{run.name}: not in {folder}, its line is kept")
            continue
        training = read_json(checkpoint, "manifest.json")["training"]
        is_finished(folder / run.name, run.plan(training["tokens"], training["plan"]["dtype"]))
        with Engine.from_pretrained(checkpoint) as engine:
            texts = texts or evaluation_texts(engine.tokenizer, novels, tokens)
            if run.name in known and not again and is_of(known[run.name], engine, texts):
                _say(f"{run.name}: measured before")
                continue
            _say(f"{run.name}: measuring")
            measured = evaluate(run, engine, texts)
            line = describe_run(run, folder / run.name, engine, measured, texts) | about
        known[run.name] = line
        check_comparable(_in_order(known))
        _write(out, _in_order(known))  # what is measured stays, whatever happens to the next
    lines = _in_order(known)
    if not lines:
        raise BenchmarkError(
            f"no run in {folder} is finished. See python -m experiments.science.train --status."
        )
    check_comparable(lines)
    summary = {
        "benchmark": "science",
        "kind": "summary",
        "case": "summary",
        **summarise(lines),
        "tokens": lines[0]["training"]["tokens"],
        **about,
    }
    for bar in summary["bars"]:
        verdict = {True: "met", False: "MISSED", None: "undecided"}[bar["met"]]
        print(
            f"{verdict:10} {bar['text']}: {bar['what']}: {bar['value']} ({bar['needed']}), "
            f"{bar['seeds']} seeds"
        )
    print(json.dumps(summary))
    _write(out, [*lines, summary])
    return 1 if any(bar["met"] is False for bar in summary["bars"]) else 0


def _in_order(known: Mapping[str, Line]) -> list[Line]:
    return [known[run.name] for run in RUNS if run.name in known]


def _write(out: Path | None, lines: Sequence[Line]) -> None:
    if out:
        write_text(out, "".join(f"{json.dumps(line)}\n" for line in lines))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
