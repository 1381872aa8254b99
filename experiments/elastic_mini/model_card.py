"""Write the model card of elastic-mini from its manifest and its measured quality.

python -m experiments.elastic_mini.model_card            writes the bundled README.md
python -m experiments.elastic_mini.model_card --check    exits 1 if the card is not up to date
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from elastic_moe.files import write_text
from elastic_moe.lab.view.frontier import format_si
from elastic_moe.model.checkpoints.checkpoint import load_config
from elastic_moe.model.checkpoints.folder import BUNDLED
from elastic_moe.model.checkpoints.weights import WEIGHTS, file_sha256
from elastic_moe.train.step.plan import completed
from elastic_moe.train.text.corpus import LIBRARY, TEXTS
from experiments.elastic_mini.recipe import HELD_OUT_AUTHORS

HERE = Path(__file__).resolve().parent
FOLDER = BUNDLED / "elastic-mini"
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "elastic-mini.jsonl"


def newest_results(weights_sha256: str) -> list[dict[str, Any]]:
    """The last measurement of these weights on each corpus."""
    lines = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    newest = {r["corpus"]["name"]: r for r in lines if r["weights_sha256"] == weights_sha256}
    return list(newest.values())


def sum_draws(parts: Iterable[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    """{axis: {value: steps}} of all trainings; thresholds above 0 together."""
    total: dict[str, Counter[str]] = {}
    for part in parts:
        for axis, counts in part.items():
            for value, count in counts.items():
                if axis == "threshold":
                    value = "0" if value == "0.00" else "0.3 to 0.9"
                total.setdefault(axis, Counter())[value] += count
    return {axis: dict(sorted(counts.items())) for axis, counts in total.items()}


def card() -> str:
    config = load_config(FOLDER)
    manifest = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))
    chain = [manifest]  # the first training first
    while "before" in chain[0]:
        chain.insert(0, chain[0]["before"])
    corpus = chain[0]["corpus"]
    library = [entry for entry in corpus["files"] if entry["corpus"] == LIBRARY]
    novels = [entry for entry in corpus["files"] if entry["corpus"] != LIBRARY]
    kinds = corpus["stream_tokens_by_kind"]
    trainings = [
        {
            **one["training"],
            "plan": completed(one["training"]["plan"], str(FOLDER)),
            "corpus": one["corpus"],
        }
        for one in chain
    ]
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["si"] = format_si
    template = environment.from_string((HERE / "model_card.md.j2").read_text(encoding="utf-8"))
    text = template.render(
        name=FOLDER.name,
        config=config,
        shape=config.shape,
        library=library,
        novels=novels,
        corpus=corpus,
        kinds={"novels": kinds.get(TEXTS, 0), **kinds},  # "novels" in manifests before
        trainings=trainings,
        draws=sum_draws(one["draws"] for one in trainings),
        held_out_authors=HELD_OUT_AUTHORS,
        results=newest_results(file_sha256(FOLDER / WEIGHTS)),
    )
    return text.rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    path, text = FOLDER / "README.md", card()
    if not args.check:
        write_text(path, text)
        return 0
    current = path.is_file() and path.read_text(encoding="utf-8") == text
    command = "python -m experiments.elastic_mini.model_card"
    print("up to date" if current else f"{path} is out of date: run {command}")
    return 0 if current else 1


if __name__ == "__main__":
    sys.exit(main())
