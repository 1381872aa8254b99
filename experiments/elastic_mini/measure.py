"""Is elastic-mini well trained, and elastic? Its quality on two held-out texts, axis by axis.

    python -m experiments.elastic_mini.measure --novels DIR --run runs/mini \\
        --out benchmarks/results/elastic-mini.jsonl

Compares sub-networks pairwise on the same tokens (paired standard errors over windows), and the
full network with what came before it: the first version's figures on the same texts
(results/elastic-mini-first.jsonl), and n-grams over the same training tokens, where --run gives
the folder of the training. Of a checkpoint that several trainings led to, it is the one that read
the most different tokens. Orders and k of the n-grams are chosen on the evaluation text, in their
favour. --out replaces the whole file, and is refused where a text or the n-grams would be lost.
Exits 1 if a bar is missed or could not be held against anything.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from elastic_moe.engine import Engine
from elastic_moe.errors import BenchmarkError, ElasticMoEError
from elastic_moe.files import write_text
from elastic_moe.lab.provenance import describe_provenance
from elastic_moe.lab.sweeps.quality import Quality, paired_difference
from elastic_moe.lab.sweeps.text import EvaluationSet
from experiments.elastic_mini.opponents import (
    NO_OPPONENTS,
    choose_training,
    opponents,
    read_trainings,
)
from experiments.science.measuring import (
    AUTHORS,
    REFERENCE,
    TOKENS,
    describe_loss,
    describe_quality,
    evaluation_texts,
    measure,
)

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
FIRST = RESULTS / "elastic-mini-first.jsonl"  # what the weights of the first version were measured

# Along each axis quality has to fall at every step, by more than 3 standard errors.
LADDERS = {
    "depth": ("full", "L24", "L12"),
    "top_k": ("full", "k2", "k1"),
    "width": ("full", "w4", "w2"),
    "pool": ("full", "p8", "p4"),
}
BUNDLES = {"full": (48, 36, 24, 12), "k2": (48,), "k1": (48,), "w4": (48,), "w2": (48,)}
BUNDLES |= {"p8": (48,), "p4": (48,)}
# And yet a reduced network may lose no more than this, in nats per token: every version, and those
# after the first.
LIMITS = {"L36": 0.6, "L24": 1.2, "k2": 0.15, "w4": 0.4, "p8": 0.6}
LIMITS_LATER = {"L36": 0.25, "k2": 0.05, "p8": 0.35}
# The whole depth must be used.
LEAST_DEPTH_LOSS, LEAST_DEPTH_LOSS_LATER = 0.05, 0.1
LEAST_GAIN_OVER_BIGRAM = 0.3
OVER_FIRST, OVER_NGRAM = 0.97, 0.93  # of their bits per byte

Line = Mapping[str, Any]


def record(engine: Engine, text: EvaluationSet, found: dict[str, Quality]) -> dict[str, Any]:
    """The line of one text, without its opponents and bars."""
    points = {
        name: describe_quality(quality, text) | describe_loss(quality, found["full"], text)
        for name, quality in found.items()
    }
    steps = []
    for names in LADDERS.values():
        for better, worse in pairwise(names):
            mean, error = paired_difference(found[worse], found[better], text)
            steps.append({"better": better, "worse": worse, "nats": mean, "standard_error": error})
    return {
        "benchmark": "elastic_mini",
        "model": engine.name,
        "weights_sha256": engine.weights_sha256,
        "trainings": [training.describe() for training in read_trainings(engine.folder)],
        "corpus": text.describe(),
        "dtype": engine.dtype,
        "backend": engine.backend,
        "points": points,
        "steps": steps,
        **describe_provenance(),
    }


class Bars(list[dict[str, Any]]):
    """Bars held against values; `met` is None where there was nothing to compare with."""

    def hold(self, what: str, value: float | None, direction: str, limit: float) -> None:
        """Add one: the value must be '<=', '>=' or '>' the limit."""
        met = rounded = None
        if value is not None:
            met = {"<=": value <= limit, ">=": value >= limit, ">": value > limit}[direction]
            rounded = round(value, 5)
        needed = f"{direction} {limit:g}"
        self.append({"what": what, "value": rounded, "needed": needed, "met": met})


def judge(line: Line, first: Line | None) -> Bars:
    """Hold all bars against a line of results; nothing is measured here.

    Args:
        line: as `record` and `opponents` give it.
        first: the first version's line on the same text; weights that are not its own must beat it.
    """
    bars = judge_any(line)
    if first is None or line["weights_sha256"] != first["weights_sha256"]:
        bars += judge_later(line, first)
    return bars


def judge_any(line: Line) -> Bars:
    """The bars of every version: trained, and elastic along every axis."""
    bars, points = Bars(), line["points"]
    full = points["full"]
    if line["bigram_nats_per_token"] is not None:
        gain = line["bigram_nats_per_token"] - full["nats_per_token"]
        bars.hold("nats better than the bigram", gain, ">=", LEAST_GAIN_OVER_BIGRAM)
    for step in line["steps"]:
        error = step["standard_error"]
        value = step["nats"] / error if error else None  # one window has no error
        bars.hold(f"{step['better']} > {step['worse']}, in standard errors", value, ">", 3)
    for name, limit in LIMITS.items():
        bars.hold(f"nats lost by {name}", points[name]["nats_lost"], "<=", limit)
    bars.hold("nats lost by L12", points["L12"]["nats_lost"], ">=", LEAST_DEPTH_LOSS)
    bars.hold("KL of full to full", full["kl_to_full"], "<=", 0)
    bars.hold("agreement of full with full", full["top1_agreement"], ">=", 1)
    return bars


def judge_later(line: Line, first: Line | None) -> Bars:
    """What only the first version need not do: beat it and the best n-gram, and lose less."""
    bars, points = Bars(), line["points"]
    full = points["full"]
    ratio = None
    if first is not None and first["corpus"] == line["corpus"]:
        ratio = full["bits_per_byte"] / first["points"]["full"]["bits_per_byte"]
    bars.hold("bits per byte over the first version's", ratio, "<=", OVER_FIRST)
    ngram = line["ngram_nats_per_token"]
    # The tokens are the same, so the nats have the ratio of the bits per byte.
    ratio = None if ngram is None else full["nats_per_token"] / ngram
    bars.hold("bits per byte over the best n-gram's", ratio, "<=", OVER_NGRAM)
    for name, limit in LIMITS_LATER.items():
        bars.hold(f"nats lost by {name}", points[name]["nats_lost"], "<=", limit)
    bars.hold("nats lost by L12", points["L12"]["nats_lost"], ">=", LEAST_DEPTH_LOSS_LATER)
    return bars


def read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """Lines of a file of results by the name of their text; the last one counts.

    Raises:
        BenchmarkError: it holds something else.
    """
    if not path.exists():
        return {}
    try:
        lines = list(map(json.loads, path.read_text(encoding="utf-8").splitlines()))
        return {line["corpus"]["name"]: line for line in lines}
    except (ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(
            f"{path} holds no results of this benchmark ({error!r:.200}). Name another file."
        ) from None


def check_out(out: Path, texts: Collection[str], *, with_ngrams: bool) -> None:
    """Refuse to replace a file by lines that say less, before minutes of measuring.

    Raises:
        BenchmarkError: a text would be lost, or what n-grams make of one; or there is no folder.
    """
    if not out.parent.is_dir():
        raise BenchmarkError(f"--out: {out.parent} is no folder. Make it first.")
    for name, line in read_lines(out).items():
        if name not in texts:
            what, option = f"the line of {name}", "--novels"
        elif not with_ngrams and any(line.get(key) is not None for key in NO_OPPONENTS):
            what, option = f"n-grams on {name}", "--run"
        else:
            continue
        raise BenchmarkError(
            f"--out: {out} has {what}, which would be lost. Give {option}, or name another file."
        )


def evaluate(
    model: str, novels: Path | None, data: Path | None, tokens: int, out: Path | None
) -> list[dict[str, Any]]:
    """The line of every text, with its bars.

    Args:
        novels: folder with the novels of the held-out authors.
        data: the prepared text that the n-grams count.
        out: where the lines are to go; nothing is written here.
    """
    if out:
        names = [REFERENCE, *([AUTHORS] if novels else [])]
        check_out(out, names, with_ngrams=data is not None)
    first = read_lines(FIRST)
    lines = []
    with Engine.from_pretrained(model) as engine:
        training = choose_training(read_trainings(engine.folder), data) if data else None
        for name, text in evaluation_texts(engine.tokenizer, novels, tokens).items():
            line = record(engine, text, measure(engine, text, BUNDLES)) | NO_OPPONENTS
            if data and training:
                line |= opponents(data, training, text, engine.config.vocab_size)
            line["bars"] = judge(line, first.get(name))
            lines.append(line)
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="elastic-mini", help="default: %(default)s")
    parser.add_argument("--novels", type=Path, help="folder with novels of the held-out authors")
    parser.add_argument("--run", type=Path, help="folder of the training that the n-grams count")
    parser.add_argument("--data", type=Path, help="its prepared text alone, in place of --run")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="scored (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the results to this .jsonl file")
    args = parser.parse_args(argv)
    if args.run and args.data:
        parser.error("--data is the text of a training without its --run: give one of them")
    data = args.run / "data" if args.run else args.data
    try:
        lines = evaluate(args.model, args.novels, data, args.tokens, args.out)
    except (ElasticMoEError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    for line in lines:
        print(f"\n{line['corpus']['name']}")
        for bar in line["bars"]:
            verdict = {True: "met", False: "MISSED", None: "NOT MEASURED"}[bar["met"]]
            print(f"{verdict:12} {bar['what']}: {bar['value']} ({bar['needed']})")
    print()
    for line in lines:
        print(json.dumps(line))
    if args.out:
        write_text(args.out, "".join(f"{json.dumps(line)}\n" for line in lines))
    return 0 if all(bar["met"] for line in lines for bar in line["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
