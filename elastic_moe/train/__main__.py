"""Train a super-network from a bare checkout: `python -m elastic_moe.train`.

Needs torch, numpy, safetensors and tokenizers only. `elastic-moe train` does the same, with a bar
on a terminal and a picture of the loss.

Stages are written LAYERSxSTEPSxPIECESxLENGTH: the depth that the network has grown to, optimiser
steps, pieces of 512 tokens per step, and tokens per sequence.

Examples:
  python -m elastic_moe.train --minutes 5               the Python library, 12 layers
  python -m elastic_moe.train --corpus texts/ --out runs/texts --tokens 10000000
  python -m elastic_moe.train --model elastic-mini --corpus novels/ --with-library
      --stages 12x1300x4x256,48x260x4x512 --out runs/mini
                                                        the shape and recipe of the bundled model
  python -m elastic_moe.train.export runs/mini mini     the run's latest state as a checkpoint
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

from elastic_moe.errors import ElasticMoEError, OptionError
from elastic_moe.train.machine import keep_freed_memory, share_the_machine
from elastic_moe.train.options import add_arguments, to_config
from elastic_moe.train.runs.progress import Event


def make_parser() -> argparse.ArgumentParser:
    """The options of a run."""
    parser = argparse.ArgumentParser(
        prog="python -m elastic_moe.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status: 0 done, 1 failed or stopped, 2 bad arguments.

    Progress goes to standard error, the summary to standard output.
    """
    started = time.monotonic()
    args = make_parser().parse_args(argv)
    share_the_machine()
    from elastic_moe.train.session import run, summary_lines  # deferred: loads torch

    keep_freed_memory()

    try:
        result = run(to_config(args), report=print_event, started=started)
    except OptionError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except (ElasticMoEError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted.\n")
        return 1
    lines = [json.dumps(result.to_json())] if args.json else summary_lines(result)
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if result.ended_by == "signal" else 0


def print_event(event: Event) -> None:
    """Print a line about the progress at once, even into a file."""
    sys.stderr.write(f"{event}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
