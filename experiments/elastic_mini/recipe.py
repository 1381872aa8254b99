"""How elastic-mini is trained: its shape, its texts, what is held out, its first training.

    python -m experiments.elastic_mini.recipe --novels DIR --out runs/mini --minutes 60

Run it again to resume. Later trainings start with the weights of the one before, on a plan of
their own: `python -m experiments.lease train --plan`. Held out from the first byte of the first
training, tokenizer included, are the novels of four authors and the language reference, which
quality is measured on.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from elastic_moe.errors import ElasticMoEError
from elastic_moe.train import TrainConfig
from elastic_moe.train.machine import keep_freed_memory, share_the_machine

HELD_OUT_AUTHORS = ("Chesterton", "Forster", "Gissing", "Schreiner")
# The language reference is pydoc_data/topics.py; "topics" is it under whatever folder it was saved.
# Authors are found anywhere in a path: a folder per author and other spellings must not pass.
HOLD_OUT = (*(f"*{author}*" for author in HELD_OUT_AUTHORS), "pydoc_data", "topics", "topics.*")
HOLD_OUT_TEXTS = (Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data",)
STAGES = "12x2700x8x256,48x800x8x512"  # layers, steps, pieces of 512 tokens, sequence length


def first_training(novels: Path, out: Path, minutes: float | None = None) -> TrainConfig:
    """14.3 million tokens of the Python library and about a third of the novels."""
    return TrainConfig(
        out=out,
        minutes=minutes,
        stages=STAGES,
        corpus=novels,
        hold_out=HOLD_OUT,
        hold_out_texts=HOLD_OUT_TEXTS,
        with_library=True,
        corpus_fraction=0.35,
        model="elastic-mini",
        reduce={"depth": 0.2, "top_k": 0.2, "width": 0.15, "pool": 0.15, "threshold": 0.05},
        save_every=50,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--novels", type=Path, required=True, help="folder of novels")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--minutes", type=float, help="end this start of the run after so long")
    args = parser.parse_args(argv)
    share_the_machine()
    from elastic_moe.train.session import run, summary_lines  # deferred: loads torch

    keep_freed_memory()
    try:
        config = first_training(args.novels, args.out, args.minutes)
        result = run(config, report=lambda event: print(event, flush=True))
    except (ElasticMoEError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    print("\n".join(summary_lines(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
