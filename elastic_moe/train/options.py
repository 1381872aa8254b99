"""The command line of a run, for `elastic-moe train` and `python -m elastic_moe.train` alike.

Made from the fields of `TrainConfig`: an option of a field is declared and explained there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from elastic_moe.routing.axes import find
from elastic_moe.sizes import parse_size
from elastic_moe.train.config import SHARD_SIZE, TrainConfig, flag, flag_of_axis, kinds, options
from elastic_moe.train.step.sampling import AXES, SamplingPlan

_JSON_HELP = "end with a summary in JSON"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare an option for every field of `TrainConfig`, and --json."""
    groups: dict[str, argparse._ActionsContainer] = {"": parser}
    for name in options():
        title = options()[name].group
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add(groups[title], name)
    groups[title].add_argument("--json", action="store_true", help=_JSON_HELP)


def _add(group: argparse._ActionsContainer, name: str) -> None:
    option, kind = options()[name], kinds()[name]
    default = TrainConfig.__dataclass_fields__[name].default
    if name == "reduce":
        add_reductions(group)
    elif name == "max_shard_bytes":
        add_shard_size(group)
    elif kind is bool:
        group.add_argument(flag(name), dest=name, action="store_true", help=option.help)
    elif kind in (int, float, str, Path):
        group.add_argument(
            flag(name),
            dest=name,
            type=kind,
            default=default,
            choices=option.choices or None,
            metavar=option.metavar,
            help=option.help,
        )
    else:  # several values
        group.add_argument(
            flag(name),
            dest=name,
            action="append",
            type=get_args(kind)[0],
            default=[],
            metavar=option.metavar,
            help=option.help,
        )


def add_reductions(group: argparse._ActionsContainer) -> None:
    """--reduce-depth and its like: one per axis."""
    option, usual = options()["reduce"], SamplingPlan()
    for axis in AXES:
        text = f"{option.help} (default: {getattr(usual, axis):g})"
        others = [name for name in find(axis).option("reduce-") if name != flag_of_axis(axis)]
        for flags, shown in (([flag_of_axis(axis)], text), (others, argparse.SUPPRESS)):
            if flags:
                group.add_argument(
                    *flags, dest=f"reduce_{axis}", type=float, metavar=option.metavar, help=shown
                )


def add_shard_size(group: argparse._ActionsContainer) -> None:
    """--max-shard-size, which the export of a run has as well."""
    option = options()["max_shard_bytes"]
    group.add_argument(
        option.flag,
        dest="max_shard_bytes",
        type=_size,
        default=SHARD_SIZE,
        metavar=option.metavar,
        help=option.help,
    )


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def to_config(args: argparse.Namespace) -> TrainConfig:
    """The configuration that parsed options ask for.

    Raises:
        OptionError: as `TrainConfig`.
    """
    values = vars(args)
    given = {name: values[name] for name in options() if name != "reduce"}
    chances = {axis: values[f"reduce_{axis}"] for axis in AXES}
    chances = {axis: chance for axis, chance in chances.items() if chance is not None}
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    return TrainConfig(**given, reduce=chances or None)
