"""What a run was begun with: the same command goes on, another one is refused by its option."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic_moe.errors import OptionError
from elastic_moe.files import write_text
from elastic_moe.train.options import CHANCES, flag

OPTIONS = "options.json"
_RECORDED = (
    *("tokens", "batch_tokens", "length", "stages", "from"),
    *("with_library", "corpus_fraction", "library_passes", "docstring_passes", "chat_fraction"),
    *(f"reduce_{axis}" for axis in CHANCES),
    *("fixed", "distill", "sandwich", "lr_scale", "bias_rate", "seed", "dtype"),
)


def to_record(args: argparse.Namespace, sizes: Mapping[str, int]) -> dict[str, Any]:
    """What `options.json` keeps of filled options.

    Texts, tokenizer and config.json are compared by their content, elsewhere. Left out is what
    decides no step: `minutes` is kept only as whether it decided how many there are.

    Args:
        sizes: of the model, by option.
    """
    decided = args.minutes is not None and args.tokens is None and args.stages is None
    return {**{name: getattr(args, name) for name in _RECORDED}, **sizes, "minutes": decided}


def check_recorded(folder: Path, now: Mapping[str, Any]) -> None:
    """Refuse options that the run of a folder was not begun with.

    Raises:
        OptionError: names the first that differs, with both values.
    """
    path = folder / OPTIONS
    if not path.is_file():
        return
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
        names = dict.fromkeys([*now, *begun])
    except (ValueError, TypeError) as error:
        raise OptionError(
            f"{path} is torn: {error}. Delete it, and only what the state says is compared."
        ) from None
    for name in names:
        before, value = begun.get(name), now.get(name)
        if before != value:
            raise OptionError(
                f"{flag(name)}: the run in {folder} was begun {_begun(before)}, got {_got(value)}. "
                f"Repeat the command that began it, or begin another one in "
                f"another folder with --out."
            )


def record(folder: Path, now: Mapping[str, Any]) -> None:
    """Write `options.json`, once for a run."""
    if not (folder / OPTIONS).exists():
        write_text(folder / OPTIONS, json.dumps(now, indent=1) + "\n")


def _begun(value: Any) -> str:
    if value is None or value is False:
        return "without it"
    return "with it" if value is True else f"with {value}"


def _got(value: Any) -> str:
    if value is None or value is False:
        return "none"
    return "it" if value is True else str(value)
