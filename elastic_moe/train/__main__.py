"""Train elastic-mini: `python -m elastic_moe.train --novels DIR --out DIR`.

Stages are written LAYERSxSTEPSxPIECESxLENGTH: the depth that the network has grown to, optimiser
steps, pieces of 512 tokens per step, and tokens per sequence.

Examples:
  python -m elastic_moe.train --out runs/mini                       the Python library alone
  python -m elastic_moe.train --novels texts/ --out runs/mini --stages 12x800x4x256,48x900x8x512
  python -m elastic_moe.train --out runs/mini --minutes 30          stop after 30 minutes; the same
                                                                    command goes on from there
  python -m elastic_moe.train.export runs/mini checkpoints/mini     the run as a checkpoint folder
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer

from elastic_moe.errors import CorpusError, ElasticMoEError, TrainingError
from elastic_moe.train.corpus import library_files, novel_files
from elastic_moe.train.data import (
    MANIFEST,
    Mixture,
    check_options,
    open_stream,
    prepare,
    read_manifest,
)
from elastic_moe.train.loop import Trainer, run
from elastic_moe.train.mini import ELASTIC_MINI
from elastic_moe.train.plan import SAVE_EVERY_STEPS, TrainingPlan, parse_stages
from elastic_moe.train.tokens import check_tokenizer

DEFAULT_STAGES = "12x1300x4x256,48x260x4x512"


def make_parser() -> argparse.ArgumentParser:
    """The options of a run."""
    parser = argparse.ArgumentParser(
        prog="python -m elastic_moe.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the run; resumed if there"
    )
    parser.add_argument(
        "--novels", type=Path, help="folder of .txt files named Author_Title_Year.txt"
    )
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json to use instead of a new one")
    parser.add_argument("--stages", default=DEFAULT_STAGES, help="default: %(default)s")
    parser.add_argument(
        "--lr-scale", type=float, default=1.0, help="factor on all learning rates (default: 1)"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long")
    parser.add_argument(
        "--save-every",
        type=int,
        default=SAVE_EVERY_STEPS,
        metavar="STEPS",
        help="steps from one saved state to the next (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser


def read_plan(args: argparse.Namespace) -> TrainingPlan:
    """The plan that the options ask for.

    Raises:
        TrainingError: an option is out of its range.
    """
    if not 0 < args.lr_scale < math.inf:
        raise TrainingError(f"--lr-scale must be positive, got {args.lr_scale}. 1 is the default.")
    if not args.minutes >= 0:
        raise TrainingError(f"--minutes must be at least 0, got {args.minutes}.")
    if args.save_every < 1:
        raise TrainingError(f"--save-every must be at least 1 step, got {args.save_every}.")
    plan = TrainingPlan(
        stages=parse_stages(args.stages), seed=args.seed, save_every_steps=args.save_every
    )
    plan.check(ELASTIC_MINI.num_layers)
    rates = {"muon_lr": plan.muon_lr * args.lr_scale, "adam_lr": plan.adam_lr * args.lr_scale}
    return replace(plan, **rates)


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer from its file, if the model can use it."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001  (the library raises nothing narrower)
        raise CorpusError(f"{path} is no tokenizer.json: {error}.") from None
    check_tokenizer(tokenizer, ELASTIC_MINI.vocab_size)
    return tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    args = make_parser().parse_args(argv)
    data = args.out / "data"
    status = 1
    try:
        manifest = read_manifest(data)[0] if (data / MANIFEST).exists() else None
        status = 2  # what is wrong with the arguments is found before any work
        plan = read_plan(args)
        tokenizer = read_tokenizer(args.tokenizer) if args.tokenizer else None
        novels = novel_files(args.novels) if args.novels else []
        if manifest is not None:
            check_options(data, manifest, seed=args.seed, novels=novels, tokenizer=tokenizer)
        status = 1
        if manifest is None:
            say(f"preparing the text in {data}, which takes a minute or two")
            prepare(
                data,
                library_files(),
                novels,
                Mixture(),
                vocab_size=ELASTIC_MINI.vocab_size,
                seed=args.seed,
                tokenizer=tokenizer,
            )
        trainer = Trainer(ELASTIC_MINI, plan, open_stream(data, args.seed))
        run(trainer, args.out, max_seconds=args.minutes * 60, report=say)
    except (ElasticMoEError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return status
    return 0


def say(line: str) -> None:
    """Print a line at once, even into a file."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
