"""Arguments that several subcommands share."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic_moe.errors import RoutingError

if TYPE_CHECKING:
    from elastic_moe.config import Routing
    from elastic_moe.engine import Engine


def add_model_name(parser: argparse.ArgumentParser) -> None:
    """MODEL and --download."""
    parser.add_argument(
        "model",
        nargs="?",
        default="elastic-mini",
        metavar="MODEL",
        help="a bundled model, a Hugging Face folder, or an id in the Hugging Face cache "
        "(default: %(default)s)",
    )
    add_download(parser)


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL, and how it runs."""
    add_model_name(parser)
    add_execution(parser)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")


def add_execution(parser: argparse.ArgumentParser) -> None:
    """--dtype and --backend."""
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="what matrix inputs are rounded to; auto: as the file's weights",
    )
    parser.add_argument(
        "--backend",
        default="auto",
        choices=("auto", "reference", "cpu"),
        help="reference: PyTorch alone; cpu: the C++ step; auto: cpu where it can run",
    )


def add_download(parser: argparse.ArgumentParser) -> None:
    """--download."""
    parser.add_argument(
        "--download",
        action="store_true",
        help="fetch a Hugging Face id that is not in the cache; otherwise nothing is fetched",
    )


def positive_integer(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return number


def add_ranking(parser: argparse.ArgumentParser) -> None:
    """--rank-channels."""
    parser.add_argument(
        "--rank-channels",
        metavar="FILE",
        type=Path,
        help="order each expert's channels by their activation on this UTF-8 text first, so that "
        "narrower experts of a model not trained for them lose less",
    )


def add_routing(parser: argparse.ArgumentParser) -> None:
    """--routing and --routing-config."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--routing", metavar="NAME", help="sub-network such as L36-k2-w6-t0.7-p8 (default: full)"
    )
    group.add_argument(
        "--routing-config",
        metavar="FILE",
        type=Path,
        help="JSON of an ElasticRoutingConfig, snake_case or camelCase; an absent key is full",
    )


def load_engine(args: argparse.Namespace, *, rank: bool = True, **options: Any) -> Engine:
    """The engine that MODEL and its options ask for; `rank` does what --rank-channels says.

    Args:
        options: fields of `EngineOptions`.
    """
    from elastic_moe.engine import Engine  # deferred: loads torch

    engine = Engine.from_pretrained(
        args.model,
        dtype=args.dtype,
        backend=args.backend,
        device=args.device,
        download=args.download,
        **options,
    )
    if rank and args.rank_channels is not None:
        from elastic_moe.lab.sweeps.text import read_corpus

        engine.rank_channels(read_corpus(args.rank_channels).text)
    return engine


def read_routing(args: argparse.Namespace) -> Routing:
    """What --routing or --routing-config says; None for the full network."""
    if args.routing_config is None:
        name: str | None = args.routing
        return name
    from elastic_moe.config import ElasticRoutingConfig  # deferred: loads pydantic

    try:
        data: Any = json.loads(args.routing_config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RoutingError(f"--routing-config {args.routing_config}: {error}.") from error
    if not isinstance(data, dict):
        raise RoutingError(f"--routing-config {args.routing_config} must hold a JSON object.")
    return ElasticRoutingConfig.full(**data)
