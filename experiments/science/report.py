"""Tables and sentences of docs/science.md: markdown, made of result files alone.

    python -m experiments.science.report
    python -m experiments.science.report --text held-out-authors

Differences are nats per token. A number over seeds is mean ± standard deviation, a difference of
two families mean ± seed standard deviation as the summary defines it; of one seed alone a
difference has the standard error over windows of text, and a mark.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from elastic_moe.errors import BenchmarkError, ElasticMoEError
from elastic_moe.routing.axes import TOP_K, TRAINED
from experiments.science.runs import SPLITS

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
# Key in `trained` -> the axis in words.
AXES = {str(a.trained): a.letter if a == TOP_K else str(a.trained) for a in TRAINED} | {"none": ""}
NOTHING, ONE_SEED = "–", "†"

Summary = Mapping[str, Any]


def read_summary(path: Path) -> Summary | None:
    """The summary of `science.jsonl`; None where there is none."""
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return next((line for line in reversed(lines) if line["kind"] == "summary"), None)


def science_table(summary: Summary, text: str) -> str:
    """One row per point: both networks, their difference, the specialist, what is published."""
    header = ["sub-network", "elastic, nats/token", "inelastic", "elastic is better by"]
    header += ["frugal is better by", "specialist is better by"]
    header += ["defaults of `train` are better by"]
    header += ["lost by elastic", "lost by ERNIE 5.0"]
    rows = []
    for point, p in summary["texts"][text]["points"].items():
        special = _spread_or_pair(p["specialist_gain"]) if point != "full" else NOTHING
        lost = p["lost"]["elastic"] if point != "full" else None
        published = p["published"]
        cells = [
            _point(point, p),
            _spread(p["elastic"]),
            _spread(p["inelastic"]),
            _gain(p["elastic_gain"]),
            _gain(p["frugal_gain"]),
            special,
            _spread_or_pair(p["drawn_gain"]),
            _spread(lost, sign="+"),
            NOTHING if published is None else f"{published['lost']:+.3f} ({published['what']})",
        ]
        rows.append(cells)
    return _table(header, rows)


def science_words(summary: Summary) -> Iterator[str]:
    """Seeds, cost of elasticity on every text, compute, and the bars that are not met."""
    seeds = ", ".join(f"{name} {len(found)}" for name, found in summary["seeds"].items() if found)
    yield f"Trained on {summary['tokens']:,} tokens each; seeds: {seeds}."
    for family, word in SPLITS.items():
        for name, text in summary["texts"].items():
            gain = text["points"]["full"][f"{family}_gain"]
            if gain is not None:
                yield (
                    f"{word} costs the full network {_cost(gain, sign=-1)} nats per token "
                    f"on {name} ({_of_seeds(gain)}; the bar judges the mean alone)."
                )
    for name, text in summary["texts"].items():
        cost = text["points"]["full"].get("drawn_cost")
        if cost is not None:
            yield (
                f"With the defaults of `train`, one network a step, it costs {_cost(cost)} on "
                f"{name} ({_of_seeds(cost)})."
            )
    shares = {
        family: of_family["of_inelastic"]
        for family, of_family in summary.get("compute", {}).items()
        if family != "inelastic" and of_family["of_inelastic"] is not None
    }
    if shares:
        each = ", ".join(f"{family} {share:.2f}" for family, share in shares.items())
        yield f"At equal tokens, training cost this share of the inelastic network's FLOPs: {each}."
    if any(map(_error_of_pair, _gains(summary))):
        yield (
            f"{ONE_SEED} 1 seed: ± is the standard error over windows of text alone, and says "
            f"nothing of other seeds."
        )
    for bar in summary["bars"]:
        if bar["met"] is not True:
            verdict = "Missed" if bar["met"] is False else f"Undecided with {bar['seeds']} seeds"
            value = NOTHING if bar["value"] is None else f"{bar['value']:.3g}"
            yield f"{verdict}, on {bar['text']}: {bar['what']}: {value}, needed {bar['needed']}."


def coherence_table(line: Mapping[str, Any]) -> str:
    """One row per sub-network: loss near and far, what it writes, when it differs."""
    text = next(iter(line["positions"]))
    first, last = line["position_edges"][1], line["trained_length"]
    temperature = line.get("temperature", 0.8)  # lines that do not say it were sampled at this
    header = ["sub-network", f"lost at 0-{first - 1}"]
    header += [f"at {last}-{line['position_edges'][-1] - 1}", "long context costs"]
    header += ["greedy: 4-grams repeated", f"sampled at {temperature:g}: 4-grams repeated"]
    header += ["perplexity under full", "distinct-2"]
    header += ["greedy: first difference", "equal of 16 / 64"]
    human = ["human text", *[NOTHING] * 4, *_written(line["writing"]["human"]["text"])]
    rows = [[*human, *[NOTHING] * 2]]
    full = line["positions"][text]["full"]
    for name, at in line["positions"][text].items():
        wrote = line["writing"][name]
        apart, change = wrote["divergence"], at["long_context"]
        differs = f"{apart['first_difference']:.1f}" if name != "full" else NOTHING
        equal = f"{apart['equal']['16']:.0%} / {apart['equal']['64']:.0%}"
        cells = [
            f"`{name}`",
            f"{at['lost'][0]:+.3f}",
            f"{at['beyond'] - full['beyond']:+.3f}",
            f"{change['nats']:+.3f} ± {change['standard_error']:.3f}",
            f"{wrote['greedy']['repeated_4']:.0%}",
            *_written(wrote["sampled"]),
            differs,
            equal if name != "full" else NOTHING,
        ]
        rows.append(cells)
    return _table(header, rows)


def _written(figures: Mapping[str, Any]) -> list[str]:
    """The cells of texts that were sampled, or written by people."""
    perplexity, distinct = figures["perplexity_under_full"], figures["distinct_2"]
    return [f"{figures['repeated_4']:.0%}", f"{perplexity:.0f}", f"{distinct:.2f}"]


def coherence_words(line: Mapping[str, Any]) -> str:
    """How the table's perplexity is to be read."""
    human, full = line["writing"]["human"]["text"], line["writing"]["full"]
    repeated = f"{full['greedy']['repeated_4']:.0%} of whose 4-grams are repeated"
    return (
        "Human text is what the prompts really go on with, in the columns of sampled text. A lower "
        "perplexity is not better: repeated text is the most predictable. Under the full network, "
        f"human text has {human['perplexity_under_full']:.0f}, its own sampled text "
        f"{full['sampled']['perplexity_under_full']:.0f}, and its own greedy text, {repeated}, "
        f"{full['greedy']['perplexity_under_full']:.0f}."
    )


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _point(name: str, p: Mapping[str, Any]) -> str:
    return f"`{name}`" if name == "full" else f"`{name}` ({AXES[p['axis']]} {p['share']:.0%})"


def _spread(spread: Mapping[str, Any] | None, sign: str = "") -> str:
    if spread is None:
        return NOTHING
    sd = "" if spread["sd"] is None else f" ± {spread['sd']:.3f}"
    return f"{spread['mean']:{sign}.3f}{sd}"


def _gains(summary: Summary) -> Iterator[Mapping[str, Any]]:
    """Every comparison that the tables show."""
    for text in summary["texts"].values():
        for point, p in text["points"].items():
            special = p["specialist_gain"] if point != "full" else None
            shown = (p["elastic_gain"], p["frugal_gain"], special, p["drawn_gain"])
            yield from (gain for gain in shown if gain is not None)


def _error_of_pair(gain: Mapping[str, Any]) -> str:
    """Of one seed: the error of its own pair, marked; "" of more, or if the text gives none."""
    error = gain["pairs"][0]["standard_error"] if gain["n"] == 1 else None
    return "" if error is None else f" ± {error:.3f}{ONE_SEED}"


def _spread_or_pair(gain: Mapping[str, Any] | None) -> str:
    return NOTHING if gain is None else _cost(gain)


def _cost(gain: Mapping[str, Any], *, sign: int = 1) -> str:
    """A difference of two families, with what it has of errors."""
    spread = "" if gain["seed_sd"] is None else f" ± {gain['seed_sd']:.3f}"
    return f"{sign * gain['mean']:+.3f}{spread}{_error_of_pair(gain)}"


def _of_seeds(gain: Mapping[str, Any]) -> str:
    if gain["n"] == 1:
        return "1 seed"
    return f"mean ± seed standard deviation, {gain['n']} seeds"


def _gain(gain: Mapping[str, Any] | None) -> str:
    if gain is None:
        return NOTHING
    sds = "" if gain["in_seed_sds"] is None else f" ({gain['in_seed_sds']:.1f} seed SDs)"
    return f"{gain['mean']:+.3f}{sds}{_error_of_pair(gain)}"


def report(results: Path, text: str | None = None) -> Iterator[str]:
    """Blocks of markdown of what result files there are.

    Args:
        text: of the experiment's table; None for all.

    Raises:
        BenchmarkError: the experiment has no table of this text.
    """
    science, coherence = results / "science.jsonl", results / "coherence.jsonl"
    summary = read_summary(science) if science.is_file() else None
    names = [] if summary is None else list(summary["texts"])
    if text is not None and text not in names:
        raise BenchmarkError(
            f"--text: {science} has no table of {text!r}; it has {', '.join(names) or 'none'}. "
            f"Name one of those, or leave --text out."
        )
    if summary is not None:
        for name in summary["texts"]:
            if text in (None, name):
                yield f"On {name}:"
                yield science_table(summary, name)
        yield "\n".join(science_words(summary))
    if coherence.is_file():
        for line in map(json.loads, coherence.read_text("utf-8").splitlines()):
            yield f"{line['case']}, on {next(iter(line['positions']))}:"
            yield coherence_table(line)
            yield coherence_words(line)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--text", help="only this text's table of the experiment")
    args = parser.parse_args(argv)
    try:
        blocks = list(report(args.results, args.text))
    except (ElasticMoEError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    print("\n\n".join(blocks) or f"no science.jsonl and no coherence.jsonl in {args.results}")
    return 0 if blocks else 1


if __name__ == "__main__":
    sys.exit(main())
