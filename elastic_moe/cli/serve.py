"""Serve a model over HTTP, as OpenAI's API is served.

Every request may choose its sub-network: `routing_config` in its body, or a name such as
elastic-mini@L24-k2 as its model. --routing is for those that do not.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from elastic_moe.cli.arguments import (
    add_model,
    add_ranking,
    add_routing,
    load_engine,
    positive_integer,
    read_routing,
)
from elastic_moe.errors import ServerError

KEYS = "ELASTIC_MOE_API_KEYS"
BUNDLED_ALIAS = "ernie-5.1-prod"  # what ElasticRoutingConfig() asks for

EXAMPLES = """examples:
  elastic-moe serve
  elastic-moe serve --port 0 --alias gpt-4o --alias my-model
  elastic-moe serve ./olmoe --routing k4 --max-num-seqs 16
  elastic-moe serve --host 0.0.0.0 --api-keys keys.txt
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    add_model(parser)
    add_routing(parser)
    add_ranking(parser)
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument(
        "--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)"
    )
    parser.add_argument(
        "--alias",
        action="append",
        metavar="NAME",
        help="another name that the model answers to; may be repeated "
        f"(default: {BUNDLED_ALIAS} for the bundled model)",
    )
    parser.add_argument(
        "--api-keys",
        metavar="FILE",
        type=Path,
        help=f"one key a line; '#' begins a comment (default: {KEYS}, separated by commas)",
    )
    parser.add_argument(
        "--expose-without-keys",
        action="store_true",
        help="listen on other addresses than loopback though nobody needs a key",
    )
    parser.add_argument(
        "--max-num-seqs",
        type=positive_integer,
        default=64,
        help="texts written at once (default: %(default)s)",
    )
    parser.add_argument(
        "--max-queue",
        type=positive_integer,
        default=1024,
        help="requests that may be unfinished; more get 429 (default: %(default)s)",
    )
    parser.add_argument(
        "--drain-seconds",
        type=float,
        default=30.0,
        metavar="S",
        help="how long running requests may take to end after SIGTERM (default: %(default)s)",
    )


def read_keys(path: Path | None) -> tuple[str, ...]:
    """The keys of a file, else those of the environment.

    Raises:
        ServerError: the file cannot be read, or has none.
    """
    if path is None:
        return tuple(key.strip() for key in os.environ.get(KEYS, "").split(",") if key.strip())
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ServerError(f"--api-keys {path} cannot be read: {error}") from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise ServerError(f"--api-keys {path} has no keys. Write one a line.")
    return keys


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    from elastic_moe.server.run import Server, listen, url_of  # deferred: loads torch, FastAPI
    from elastic_moe.server.settings import ServerSettings

    settings = ServerSettings(
        host=args.host,
        port=args.port,
        api_keys=read_keys(args.api_keys),
        aliases=_aliases(args),
        routing=read_routing(args),
        drain_seconds=args.drain_seconds,
        expose_without_keys=args.expose_without_keys,
    )
    listener = listen(settings.host, settings.port)  # before the model takes its time
    with (
        listener,
        load_engine(args, max_num_seqs=args.max_num_seqs, max_queue=args.max_queue) as engine,
    ):
        names = ", ".join((engine.name, *settings.aliases))
        print(f"{names} on {url_of(listener)}/v1", file=sys.stderr, flush=True)
        Server(engine, settings).run(sockets=[listener])
    return 0


def _aliases(args: argparse.Namespace) -> tuple[str, ...]:
    if args.alias is not None:
        return tuple(args.alias)
    return (BUNDLED_ALIAS,) if args.model == "elastic-mini" else ()
