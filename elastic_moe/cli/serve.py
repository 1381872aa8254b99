"""Serve a model over HTTP, as OpenAI's API is served.

Every request may choose its sub-network: by `routing_config` in its body, or by a model name such
as elastic-mini@L24-k2. --routing is the default of requests that choose none.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic_moe.cli.arguments import (
    add_axis,
    add_model,
    add_ranking,
    add_routing,
    axis_number,
    load_engine,
    positive_integer,
    read_routing,
)
from elastic_moe.errors import ServerError
from elastic_moe.routing.axes import TRAINED
from elastic_moe.server.child_process import exit_with_stdin, url_file

if TYPE_CHECKING:
    from elastic_moe.server.routing.limits import Limits

KEYS = "ELASTIC_MOE_API_KEYS"
ADMIN_KEYS = "ELASTIC_MOE_ADMIN_KEYS"
BUNDLED_ALIAS = "ernie-5.1-prod"  # what ElasticRoutingConfig() asks for

EXAMPLES = """examples:
  elastic-moe serve
  elastic-moe serve --port 0 --alias gpt-4o --alias my-model --seed 0
  elastic-moe serve ./olmoe --routing k4 --max-num-seqs 16
  elastic-moe serve --host 0.0.0.0 --api-keys keys.txt
  elastic-moe serve --max-depth 24 --max-top-k 2 --profiles profiles.toml
  elastic-moe serve --inject remote
  elastic-moe serve --request-timeout 300 --log-format json 2>> requests.jsonl
  elastic-moe serve --port 0 --url-file url --end-with-stdin
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    add_model(parser)
    add_routing(parser)
    add_ranking(parser)
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="seed of requests that have none, so that equal requests get equal answers "
        "(default: answers vary from run to run)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument(
        "--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)"
    )
    parser.add_argument(
        "--alias",
        action="append",
        metavar="NAME",
        help="another name of the model; may be repeated "
        f"(default: {BUNDLED_ALIAS} for the bundled model)",
    )
    parser.add_argument(
        "--api-keys",
        metavar="FILE",
        type=Path,
        help="file with one key per line; '#' starts a comment "
        f"(default: {KEYS}, separated by commas)",
    )
    parser.add_argument(
        "--admin-keys",
        metavar="FILE",
        type=Path,
        help="the same for /admin/*, which is shut without such keys "
        f"(default: {ADMIN_KEYS}, separated by commas)",
    )
    parser.add_argument(
        "--expose-without-keys",
        action="store_true",
        help="allow a --host other than loopback without API keys",
    )
    parser.add_argument(
        "--max-num-seqs",
        type=positive_integer,
        default=64,
        help="texts generated at once (default: %(default)s)",
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
        help="time for running requests to finish after SIGTERM; the rest receive an error "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--url-file",
        metavar="FILE",
        type=Path,
        help="write the server's URL there once it is ready; deleted when the server ends",
    )
    parser.add_argument(
        "--end-with-stdin",
        action="store_true",
        help="exit as on SIGTERM when standard input ends, such as a pipe to the parent process",
    )
    parser.add_argument(
        "--request-timeout",
        type=float,
        metavar="S",
        help="time limit of a request; then it gets 504, or an error in its stream "
        "(default: no limit)",
    )
    parser.add_argument(
        "--read-timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="time limit for a body to arrive; then the request gets 408 (default: %(default)s)",
    )
    parser.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="format of the log on stderr: a line per request, without prompts, answers or keys "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="debug: also requests for /health, /ready and /metrics; warning: only failures and "
        "timeouts; error: only faults of the server (default: %(default)s)",
    )
    parser.add_argument(
        "--profiles",
        metavar="FILE",
        type=Path,
        help="TOML file of profiles, which requests name; created with the built-in ones if "
        "missing, changed by PUT /admin/profiles/NAME",
    )
    parser.add_argument(
        "--inject",
        nargs="?",
        const="on",
        default="off",
        choices=("on", "remote"),
        help="allow fault injection by request headers and /admin/faults; remote: start with "
        "200 to 400 ms of latency",
    )
    add_limits(parser)


def add_limits(parser: argparse.ArgumentParser) -> None:
    """How far requests may go on each axis."""
    group = parser.add_argument_group("limits of what requests may ask for")
    for axis in TRAINED:
        metavar = "T" if axis.kind == "real" else "N"
        for prefix, words in (("min-", "at least"), ("max-", "at most")):
            add_axis(
                group,
                axis,
                prefix,
                type=axis_number(axis),
                metavar=metavar,
                help=f"{words} this many {axis.unit}"
                if metavar == "N"
                else f"{words} this {axis.unit}",
            )
    group.add_argument(
        "--beyond-limits",
        choices=("clamp", "refuse"),
        default="clamp",
        help="clamp: run what is nearest and say so in the answer's routing.limited; refuse: "
        "answer 400 (default: %(default)s)",
    )


def read_limits(args: argparse.Namespace) -> Limits:
    """What these options say."""
    from elastic_moe.server.routing.limits import Limits  # deferred: loads pydantic

    bounds: dict[str, Any] = {
        axis.name: (getattr(args, f"min_{axis.name}"), getattr(args, f"max_{axis.name}"))
        for axis in TRAINED
    }
    return Limits(refuse=args.beyond_limits == "refuse", **bounds)


def read_keys(path: Path | None, variable: str = KEYS, flag: str = "--api-keys") -> tuple[str, ...]:
    """The keys of a file, else those of the environment.

    Raises:
        ServerError: the file cannot be read, or has none.
    """
    if path is None:
        return tuple(key.strip() for key in os.environ.get(variable, "").split(",") if key.strip())
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ServerError(f"{flag} {path} cannot be read: {error}") from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise ServerError(f"{flag} {path} has no keys. Write one a line.")
    return keys


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    from elastic_moe.server.observe import logs
    from elastic_moe.server.run import Server, listen, url_of  # deferred: loads FastAPI
    from elastic_moe.server.settings import ServerSettings

    if args.end_with_stdin:
        exit_with_stdin()
    settings = ServerSettings(
        host=args.host,
        port=args.port,
        api_keys=read_keys(args.api_keys),
        admin_keys=read_keys(args.admin_keys, ADMIN_KEYS, "--admin-keys"),
        profiles=args.profiles,
        limits=read_limits(args),
        inject=args.inject,
        aliases=_aliases(args),
        routing=read_routing(args),
        seed=args.seed,
        drain_seconds=args.drain_seconds,
        read_timeout_seconds=args.read_timeout,
        request_timeout_seconds=args.request_timeout,
        expose_without_keys=args.expose_without_keys,
    )
    listener = listen(settings.host, settings.port)  # fails before the model is loaded
    with (
        listener,
        url_file(args.url_file, url_of(listener)) as on_ready,
        load_engine(args, max_num_seqs=args.max_num_seqs, max_queue=args.max_queue) as engine,
    ):
        names = ", ".join((engine.name, *settings.aliases))
        line = logs.startup_line(args.log_format, f"{names} on {url_of(listener)}/v1")
        print(line, file=sys.stderr, flush=True)
        logs.configure(args.log_format, args.log_level)
        Server(engine, settings, on_ready).run(sockets=[listener])
    return 0


def _aliases(args: argparse.Namespace) -> tuple[str, ...]:
    if args.alias is not None:
        return tuple(args.alias)
    return (BUNDLED_ALIAS,) if args.model == "elastic-mini" else ()
