"""Train elastic-mini: `python -m elastic_moe.train --novels DIR --out DIR`.

Stages are written LAYERSxSTEPSxPIECESxLENGTH: the depth that the network has grown to, optimiser
steps, pieces of 512 tokens per step, and tokens per sequence.

Examples:
  python -m elastic_moe.train --out runs/mini                       the Python library alone
  python -m elastic_moe.train --novels texts/ --out runs/mini --stages 12x800x4x256,48x900x8x512
  python -m elastic_moe.train --out runs/mini --minutes 30          stop after 30 minutes; the same
                                                                    command goes on from there
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from elastic_moe.train.corpus import library_files, novel_files
from elastic_moe.train.loop import Trainer, run
from elastic_moe.train.mini import ELASTIC_MINI
from elastic_moe.train.plan import TrainingPlan, parse_stages
from elastic_moe.train.tokens import BOS, Mixture, TokenStream, prepare, special_id

DEFAULT_STAGES = "12x1300x4x256,48x260x4x512"


def main() -> None:
    """Run the command line."""
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
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    data = args.out / "data"
    if not (data / "manifest.json").exists():
        novels = novel_files(args.novels) if args.novels else []
        tokenizer = Tokenizer.from_file(str(args.tokenizer)) if args.tokenizer else None
        vocab_size = ELASTIC_MINI.vocab_size
        prepare(
            data,
            library_files(),
            novels,
            Mixture(),
            vocab_size=vocab_size,
            seed=args.seed,
            tokenizer=tokenizer,
        )
    bos = special_id(Tokenizer.from_file(str(data / "tokenizer.json")), BOS)
    stream = TokenStream(np.load(data / "train.npy", mmap_mode="r"), bos, args.seed)
    torch.manual_seed(args.seed)
    plan = TrainingPlan(stages=parse_stages(args.stages), seed=args.seed)
    run(Trainer(ELASTIC_MINI, plan, stream), args.out, max_seconds=args.minutes * 60)


if __name__ == "__main__":
    main()
