"""What the README shows of the experiment and of coherence: markdown, made of result files alone.

    python -m benchmarks.science.report
    python -m benchmarks.science.report --text held-out-authors

Differences are nats per token. A number over seeds is mean ± standard deviation.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"
AXES = {"none": "", "top_k": "k", "depth": "depth", "pool": "pool", "width": "width"}
NOTHING = "–"

Summary = Mapping[str, Any]


def read_summary(path: Path) -> Summary | None:
    """The summary of `science.jsonl`; None where there is none."""
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return next((line for line in reversed(lines) if line["kind"] == "summary"), None)


def science_table(summary: Summary, text: str) -> str:
    """One row per point: both networks, their difference, the specialist, what is published."""
    header = ["sub-network", "elastic, nats/token", "inelastic", "elastic is better by"]
    header += ["specialist is better by", "lost by elastic", "lost by ERNIE 5.0"]
    rows = []
    for point, p in summary["texts"][text]["points"].items():
        special = p["specialist_gain"] if point != "full" else None
        lost = p["lost"]["elastic"] if point != "full" else None
        published = p["published"]
        cells = [
            _point(point, p),
            _spread(p["elastic"]),
            _spread(p["inelastic"]),
            _gain(p["elastic_gain"]),
            _signed(special),
            _spread(lost, sign="+"),
            NOTHING if published is None else f"{published['lost']:+.3f} ({published['what']})",
        ]
        rows.append(cells)
    return _table(header, rows)


def science_words(summary: Summary) -> Iterator[str]:
    """Seeds, cost of elasticity on every text, and the bars that are not met."""
    seeds = ", ".join(f"{name} {len(found)}" for name, found in summary["seeds"].items() if found)
    yield f"Trained on {summary['tokens']:,} tokens each; seeds: {seeds}."
    for name, text in summary["texts"].items():
        gain = text["points"]["full"]["elastic_gain"]
        if gain is not None:
            spread = "" if gain["sd"] is None else f" ± {gain['sd']:.3f}"
            yield (
                f"Elasticity costs the full network {-gain['mean']:+.3f}{spread} nats per token on "
                f"{name} ({gain['n']} seeds)."
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
    header = ["sub-network", f"lost at 0-{first - 1}"]
    header += [f"at {last}-{line['position_edges'][-1] - 1}", "long context costs"]
    header += ["4-grams repeated, greedy", "distinct-2, sampled", "its perplexity under full"]
    header += ["first difference", "equal of 16 / 64"]
    human = line["writing"]["human"]["text"]
    rows = [["human text", *[NOTHING] * 3, f"{human['repeated_4']:.0%}"]]
    rows[0] += [f"{human['distinct_2']:.2f}", f"{human['perplexity_under_full']:.0f}"]
    rows[0] += [NOTHING] * 2
    full = line["positions"][text]["full"]
    for name, at in line["positions"][text].items():
        wrote = line["writing"][name]
        apart, sampled = wrote["divergence"], wrote["sampled"]
        change = at["long_context"]
        differs = f"{apart['first_difference']:.1f}" if name != "full" else NOTHING
        equal = f"{apart['equal']['16']:.0%} / {apart['equal']['64']:.0%}"
        cells = [
            f"`{name}`",
            f"{at['lost'][0]:+.3f}",
            f"{at['beyond'] - full['beyond']:+.3f}",
            f"{change['nats']:+.3f} ± {change['standard_error']:.3f}",
            f"{wrote['greedy']['repeated_4']:.0%}",
            f"{sampled['distinct_2']:.2f}",
            f"{sampled['perplexity_under_full']:.0f}",
            differs,
            equal if name != "full" else NOTHING,
        ]
        rows.append(cells)
    return _table(header, rows)


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


def _signed(gain: Mapping[str, Any] | None) -> str:
    return _spread(gain, sign="+") if gain is None or gain["n"] > 1 else f"{gain['mean']:+.3f}"


def _gain(gain: Mapping[str, Any] | None) -> str:
    if gain is None:
        return NOTHING
    sds = "" if gain["in_seed_sds"] is None else f" ({gain['in_seed_sds']:.1f} seed SDs)"
    return f"{gain['mean']:+.3f}{sds}"


def report(results: Path, text: str | None = None) -> Iterator[str]:
    """Blocks of markdown of what result files there are.

    Args:
        text: of the experiment's table; None for all.
    """
    science, coherence = results / "science.jsonl", results / "coherence.jsonl"
    summary = read_summary(science) if science.is_file() else None
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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--text", help="only this text's table of the experiment")
    args = parser.parse_args()
    blocks = list(report(args.results, args.text))
    print("\n\n".join(blocks) or f"no science.jsonl and no coherence.jsonl in {args.results}")
    return 0 if blocks else 1


if __name__ == "__main__":
    sys.exit(main())
