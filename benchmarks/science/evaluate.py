"""Measure the networks of the experiment, and say what they say together.

    python -m benchmarks.science.evaluate --runs runs/science --novels DIR \\
        --out benchmarks/results/science.jsonl

One line per finished run and one summary; --out replaces the whole file. Runs that are not finished
are left out, and the summary says how many seeds each number has: a bar is met or missed with three
seeds of both sides, undecided before. Exits 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.science.measuring import (
    TOKENS,
    Bundles,
    describe_loss,
    describe_quality,
    evaluation_texts,
    measure,
)
from benchmarks.science.runs import CHECKPOINT, RUNS, SITTINGS, SPECIALISTS, Run
from benchmarks.science.summary import POINTS, Measured, summarise
from elastic_moe.engine import Engine
from elastic_moe.errors import BenchmarkError, ElasticMoEError
from elastic_moe.files import write_text
from elastic_moe.lab.record import describe_commit, describe_machine, describe_versions
from elastic_moe.lab.text import EvaluationSet
from elastic_moe.train.log import read_log

# One pass over the deepest of each gives all its depths.
BUNDLES: Bundles = {"full": (12, 9, 6), "k2": (12,), "k1": (12,), "p8": (12,), "w4": (12,)}
SPECIAL: dict[str, Bundles] = {"depth9": {"L9": (9,)}, "pool8": {"p8": (12,)}}


def evaluate(run: Run, engine: Engine, texts: Mapping[str, EvaluationSet]) -> Measured:
    """Quality at every point of the run, on every text; a specialist has its own point alone."""
    bundles = SPECIAL.get(run.family, BUNDLES)
    found = {name: measure(engine, text, bundles) for name, text in texts.items()}
    expected = [SPECIALISTS[run.family]] if run.family in SPECIALISTS else list(POINTS)
    return {name: {point: found[name][point] for point in expected} for name in found}


def describe_run(
    run: Run,
    folder: Path,
    engine: Engine,
    measured: Measured,
    texts: Mapping[str, EvaluationSet],
) -> dict[str, Any]:
    """The line of one run."""
    manifest = json.loads((folder / CHECKPOINT / "manifest.json").read_text(encoding="utf-8"))
    training, corpus, shape = manifest["training"], manifest["corpus"], engine.shape
    noted = folder / SITTINGS  # may be missing where checkpoint and log came from elsewhere
    sittings = noted.read_text(encoding="utf-8").splitlines() if noted.is_file() else []
    devices = dict.fromkeys(json.loads(sitting)["device"] for sitting in sittings)
    told = {}
    for name, text in texts.items():
        points = {}
        for point, quality in measured[name].items():
            full = measured[name].get("full")
            loss = dict.fromkeys(("nats_lost", "standard_error", "kl_to_full", "top1_agreement"))
            if full is not None:
                loss = describe_loss(quality, full, text)
            points[point] = describe_quality(quality, text) | loss
        told[name] = {"corpus": text.describe(), "points": points}
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
            "sampling": training["plan"]["sampling"],
            "seconds": round(sum(record["seconds"] for record in read_log(folder)), 1),
            "device": ", ".join(devices) or None,
            "dtype": training["plan"]["dtype"],
        },
        "data": {
            "corpus_sha256": engine.config.elastic.corpus_sha256 if engine.config.elastic else None,
            "stream_sha256": corpus["stream_sha256"],
            "stream_tokens": corpus["stream_tokens"],
        },
        "weights_sha256": engine.weights_sha256,
        "dtype": engine.dtype,
        "backend": engine.backend,
        "texts": told,
    }


def check_comparable(lines: list[dict[str, Any]]) -> None:
    """Refuse runs that did not read the same.

    Raises:
        BenchmarkError: names two runs, and what differs.
    """
    for line in lines[1:]:
        for part, key in (("data", "stream_sha256"), ("training", "tokens"), ("training", "dtype")):
            ours, theirs = line[part][key], lines[0][part][key]
            if ours != theirs:
                raise BenchmarkError(
                    f"{line['case']} and {lines[0]['case']} cannot be compared: {key} is {ours} "
                    f"and {theirs}. Train them with one --data, one --tokens and one --dtype."
                )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, required=True, help="--out of the training")
    parser.add_argument("--novels", type=Path, required=True, help="with the held-out authors")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="scored (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the results to this .jsonl file")
    args = parser.parse_args()
    try:
        return _evaluate_all(args.runs, args.novels, args.tokens, args.out)
    except (ElasticMoEError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


def _evaluate_all(folder: Path, novels: Path, tokens: int, out: Path | None) -> int:
    finished = [run for run in RUNS if (folder / run.name / CHECKPOINT / "manifest.json").is_file()]
    if not finished:
        raise BenchmarkError(
            f"no run in {folder} is finished. See python -m benchmarks.science.train --status."
        )
    about = {
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": describe_commit(),
    }
    runs: dict[tuple[str, int], Measured] = {}
    lines: list[dict[str, Any]] = []
    texts: dict[str, EvaluationSet] = {}
    for run in finished:
        print(run.name, file=sys.stderr)
        with Engine.from_pretrained(folder / run.name / CHECKPOINT) as engine:
            texts = texts or evaluation_texts(engine.tokenizer, novels, tokens)
            measured = evaluate(run, engine, texts)
            lines.append(describe_run(run, folder / run.name, engine, measured, texts) | about)
        check_comparable(lines)
        runs[run.family, run.seed] = measured
    summary = {
        "benchmark": "science",
        "kind": "summary",
        "case": "summary",
        **summarise(runs, texts),
        "tokens": lines[0]["training"]["tokens"],
        **about,
    }
    for bar in summary["bars"]:
        verdict = {True: "met", False: "MISSED", None: "undecided"}[bar["met"]]
        print(
            f"{verdict:10} {bar['text']}: {bar['what']}: {bar['value']} ({bar['needed']}), "
            f"{bar['seeds']} seeds"
        )
    lines.append(summary)
    print(json.dumps(summary))
    if out:
        write_text(out, "".join(f"{json.dumps(line)}\n" for line in lines))
    return 1 if any(bar["met"] is False for bar in summary["bars"]) else 0


if __name__ == "__main__":
    sys.exit(main())
