"""Arguments that several subcommands share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic_moe.errors import RoutingError
from elastic_moe.routing import is_name
from elastic_moe.routing.axes import Axis

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
    """--dtype, --backend and --threads."""
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
    parser.add_argument(
        "--threads",
        metavar="N",
        type=positive_integer,
        help="threads of the kernels, at most (default: as many as there are cores to use); fewer "
        "take part where other programs want the cores",
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
        "--routing",
        metavar="NAME",
        help="sub-network such as L36-k2-w6-t0.7-p8, or a JSON file of one (default: full)",
    )
    group.add_argument(
        "--routing-config",
        metavar="FILE",
        type=Path,
        help="JSON of a routing_config, of an ElasticRoutingConfig or of an answer's routing; an "
        "absent key is full",
    )


def add_axis(
    parser: argparse._ActionsContainer, axis: Axis, prefix: str = "", **options: Any
) -> None:
    """--PREFIX-AXIS: the help shows one spelling, and every spelling is accepted.

    Args:
        prefix: such as 'max-'; the value is in `args` as `max_` and the axis's own name.
        options: of `add_argument`.
    """
    shown, *others = axis.option(prefix)
    dest = f"{prefix}{axis.name}".replace("-", "_")
    parser.add_argument(shown, dest=dest, **options)
    if others:
        parser.add_argument(*others, dest=dest, **{**options, "help": argparse.SUPPRESS})


def axis_number(axis: Axis) -> Callable[[str], Any]:
    """An argparse type: one value of an axis."""
    return float if axis.kind == "real" else positive_integer


def load_engine(args: argparse.Namespace, *, rank: bool = True, **options: Any) -> Engine:
    """The engine that MODEL and its options ask for; `rank` does what --rank-channels says.

    Args:
        options: fields of `EngineConfig`.
    """
    from elastic_moe.engine import Engine  # deferred: slow to load

    engine = Engine.from_pretrained(
        args.model,
        dtype=args.dtype,
        backend=args.backend,
        device=args.device,
        download=args.download,
        num_threads=args.threads,
        **options,
    )
    if rank and args.rank_channels is not None:
        from elastic_moe.lab.sweeps.text import read_corpus

        engine.rank_channels(read_corpus(args.rank_channels).text)
    return engine


def read_routing(args: argparse.Namespace) -> Routing:
    """What --routing or --routing-config says; None for the full network."""
    if args.routing_config is not None:
        return _read_file(args.routing_config, "--routing-config ")
    return read_name(args.routing)


def read_name(name: str | None) -> Routing:
    """A sub-network by name, or by the JSON file that stands in place of a name.

    Raises:
        RoutingError: the file cannot be read, or holds no configuration.
    """
    if name is not None and (
        name.endswith(".json") or (not is_name(name) and Path(name).is_file())
    ):
        return _read_file(Path(name))
    return name


def _read_file(path: Path, option: str = "") -> Routing:
    from elastic_moe.config import RoutingConfig  # deferred: loads pydantic

    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RoutingError(f"{option}{path}: {error}.") from error
    if not isinstance(data, dict):
        raise RoutingError(f"{option}{path} must hold a JSON object.")
    return RoutingConfig.parse(data)
