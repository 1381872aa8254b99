"""Write the model card of elastic-mini from its manifest and its measured quality.

python -m benchmarks.model_card            writes elastic_moe/bundled/elastic-mini/README.md
python -m benchmarks.model_card --check    exits 1 if the card is not up to date
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from elastic_moe.files import write_text
from elastic_moe.lab.frontier import format_si
from elastic_moe.model.checkpoint import load_config
from elastic_moe.model.folder import BUNDLED
from elastic_moe.model.weights import WEIGHTS, file_sha256
from elastic_moe.train.corpus import HELD_OUT_AUTHORS, LIBRARY, TEXTS

HERE = Path(__file__).resolve().parent
FOLDER = BUNDLED / "elastic-mini"
RESULTS = HERE / "results" / "elastic-mini.jsonl"


def newest_results(weights_sha256: str) -> list[dict[str, Any]]:
    """The last measurement of these weights on each corpus."""
    lines = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    newest = {r["corpus"]["name"]: r for r in lines if r["weights_sha256"] == weights_sha256}
    return list(newest.values())


def card() -> str:
    config = load_config(FOLDER)
    manifest = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))
    corpus, training = manifest["corpus"], manifest["training"]
    library = [entry for entry in corpus["files"] if entry["corpus"] == LIBRARY]
    novels = [entry for entry in corpus["files"] if entry["corpus"] != LIBRARY]
    kinds = corpus["stream_tokens_by_kind"]
    draws = dict(training["draws"])
    thresholds = draws.pop("threshold")
    positive = sum(count for value, count in thresholds.items() if value != "0.00")
    draws["threshold"] = {"0": thresholds.get("0.00", 0), "0.3 to 0.9": positive}
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
        training=training,
        draws=draws,
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
    print(
        "up to date" if current else f"{path} is out of date: run python -m benchmarks.model_card"
    )
    return 0 if current else 1


if __name__ == "__main__":
    sys.exit(main())
