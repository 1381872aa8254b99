"""The `elastic-moe` command. Each subcommand is a module here, loaded when it is used."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from elastic_moe import __version__
from elastic_moe.errors import (
    ElasticMoEError,
    ExtractError,
    OptionError,
    RequestError,
    ResultExistsError,
    RoutingError,
    ServerError,
)

# Subcommand -> what the overview says of it.
COMMANDS = {
    "sweep": "measure quality against cost over a grid of sub-networks",
    "generate": "stream text under a sub-network",
    "serve": "serve a model over HTTP, as OpenAI's API is served",
    "train": "train a super-network, on texts of yours or on the Python library",
    "extract": "write a sub-network as a standard checkpoint of its own",
    "budget": "tell what a super-network cost to train, and each network that comes out of it",
    "bench": "time a model beside this machine's limits, or an expert kernel of yours",
    "info": "show a model's shape and axes, a sub-network's cost, and this install",
}
DONE, FAILED, BAD_ARGUMENTS = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 failed, 2 bad arguments."""
    # Read by OpenMP when a command loads torch: waiting threads sleep after microseconds. As they
    # spin by default, commands take a multiple of their time where anything else runs.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="elastic-moe",
        description="Run one mixture-of-experts checkpoint at the cost you choose.",
        epilog="elastic-moe COMMAND --help shows options and examples of a command.",
    )
    parser.add_argument("--version", action="version", version=f"elastic-moe {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    wanted = next((word for word in arguments if word in COMMANDS), None)
    for name, summary in COMMANDS.items():
        if name != wanted:
            commands.add_parser(name, help=summary, add_help=False)
            continue
        module = importlib.import_module(f"elastic_moe.cli.{name}")
        command = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    try:
        status: int = args.run(args)
        return status
    except (
        RoutingError,
        RequestError,
        ExtractError,
        ResultExistsError,
        ServerError,
        OptionError,
    ) as error:
        print(f"elastic-moe {args.command}: {error}", file=sys.stderr)
        return BAD_ARGUMENTS
    except ElasticMoEError as error:
        print(f"elastic-moe {args.command}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        sys.stderr.close()
        return FAILED
    except OSError as error:  # a full disk, a folder that has gone
        where = f"{error.filename}: " if error.filename else ""
        print(f"elastic-moe {args.command}: {where}{error.strerror or error}.", file=sys.stderr)
        return FAILED
    except ValueError as error:
        from elastic_moe_kernels.errors import KernelError  # deferred: --help needs no kernels

        if not isinstance(error, KernelError):
            raise
        print(f"elastic-moe {args.command}: {error}", file=sys.stderr)
        return FAILED
