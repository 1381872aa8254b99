"""The options of a run, for `elastic-moe train` and `python -m elastic_moe.train` alike."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

from elastic_moe.errors import OptionError
from elastic_moe.files import parse_size
from elastic_moe.model.checkpoints.folder import BUNDLED
from elastic_moe.train.models import MODELS, SIZES, SMALL
from elastic_moe.train.step.plan import BALANCE, DTYPES, PIECE_TOKENS, SAVE_EVERY_STEPS
from elastic_moe.train.step.sampling import SamplingPlan
from elastic_moe.train.text.prepare import Mixture

OUT = Path("train-out")
TOKENS = 3_000_000  # about one pass over the Python library
BATCH_TOKENS, LENGTH = 2048, 256
CHANCES = ("depth", "pool", "top_k", "width", "threshold")
SHARES = {"full_share": "full", "prefix_share": "prefix", "per_layer_share": "per_layer"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--out",
        type=Path,
        default=OUT,
        metavar="DIR",
        help="folder of the run; one that is there goes on (default: %(default)s)",
    )
    _add_length(parser.add_argument_group("how long"))
    _add_text(parser.add_argument_group("text"))
    _add_model(parser.add_argument_group("model"))
    _add_elastic(parser.add_argument_group("elasticity"))
    group = parser.add_argument_group("optimisation and machine")
    group.add_argument(
        "--lr-scale",
        type=float,
        default=1.0,
        metavar="X",
        help="factor on all learning rates (default: %(default)s)",
    )
    group.add_argument(
        "--bias-rate",
        type=float,
        default=0.0,
        metavar="X",
        help="balance the experts by moving their correction biases so far each step, where the "
        "architecture stores them (ERNIE 4.5)",
    )
    group.add_argument(
        "--balance",
        type=float,
        default=BALANCE,
        metavar="X",
        help="weight of the loss that evens out the experts' loads (default: %(default)s)",
    )
    group.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    group.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of matrix products' inputs"
    )
    group.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    group.add_argument(
        "--backend",
        choices=("auto", "reference", "cpu"),
        default="auto",
        help="reference: PyTorch alone; cpu: the C++ kernels; auto: cpu where it can run",
    )
    group.add_argument(
        "--save-every",
        type=int,
        default=SAVE_EVERY_STEPS,
        metavar="STEPS",
        help="what a crash can lose at most (default: %(default)s)",
    )
    add_shard_size(group)
    group.add_argument("--json", action="store_true", help="end with a summary in JSON")


def add_shard_size(parser: argparse._ActionsContainer) -> None:
    """--max-shard-size."""
    parser.add_argument(
        "--max-shard-size",
        type=_size,
        default="5GB",
        metavar="SIZE",
        help="split the checkpoint's weights beyond it into several files (default: %(default)s)",
    )


def _add_length(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="time box, preparing the text included. Alone it decides how many steps the run has, "
        "from the time of a few; with --tokens or --stages it only ends this start of the run",
    )
    group.add_argument(
        "--tokens", type=int, metavar="N", help=f"tokens to train on (default: {TOKENS:,})"
    )
    group.add_argument(
        "--batch-tokens",
        type=int,
        metavar="N",
        help=f"tokens of a step, a multiple of {PIECE_TOKENS} (default: {BATCH_TOKENS})",
    )
    group.add_argument(
        "--length",
        type=int,
        metavar="N",
        help=f"tokens of a sequence, a divisor of {PIECE_TOKENS} (default: {LENGTH})",
    )
    group.add_argument(
        "--stages",
        metavar="LIST",
        help="instead of the three above: LAYERSxSTEPSxPIECESxLENGTH,... of a network that grows "
        f"from stage to stage; a piece is {PIECE_TOKENS} tokens",
    )


def _add_text(group: argparse._ActionsContainer) -> None:
    usual = Mixture()
    group.add_argument(
        "--corpus",
        type=Path,
        metavar="DIR",
        help="read every UTF-8 text below DIR instead of the Python library; hidden files and "
        "files with NUL bytes are skipped, and what is held out for evaluation",
    )
    group.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="PATTERN",
        help="of DIR only files like this, such as '*.md'; may be repeated",
    )
    group.add_argument(
        "--with-library", action="store_true", help="read the Python library besides DIR"
    )
    group.add_argument(
        "--corpus-fraction",
        type=float,
        metavar="X",
        help=f"read this share of DIR's texts, evenly (default: {usual.text_fraction:g})",
    )
    for kind, times in (("library", usual.library_passes), ("docstring", usual.docstring_passes)):
        group.add_argument(
            f"--{kind}-passes",
            type=int,
            metavar="N",
            help=f"times that the library's {kind.replace('library', 'source')}s are in the text "
            f"(default: {times})",
        )
    group.add_argument(
        "--chat-fraction",
        type=float,
        metavar="X",
        help="share of chats about the library's docstrings "
        f"(default: {usual.chat_fraction:g}; 0 without the library)",
    )
    group.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="tokenizer.json, or a checkpoint that has one, instead of a new one",
    )
    group.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="tokens that the model and a new tokenizer know (default: 4096, or as many as "
        "--tokenizer has)",
    )


def _add_model(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--model",
        choices=sorted(MODELS),
        metavar="NAME",
        help=f"shape that the sizes below change: {' or '.join(sorted(MODELS))} (default: {SMALL})",
    )
    for size in SIZES:
        usual = getattr(MODELS[SMALL], size.field)
        group.add_argument(
            f"--{size.option}", type=int, metavar="N", help=f"{size.help} (default: {usual})"
        )
    group.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="Hugging Face config.json instead: Qwen3-MoE, OLMoE, Mixtral or ERNIE 4.5 MoE with "
        "tied embeddings",
    )
    group.add_argument(
        "--from",
        metavar="CHECKPOINT",
        help="begin with the weights and the tokenizer of a checkpoint, and a fresh optimiser",
    )


def _add_elastic(group: argparse._ActionsContainer) -> None:
    usual = SamplingPlan()
    for axis in CHANCES:
        group.add_argument(
            f"--reduce-{axis.replace('_', '-')}",
            type=float,
            metavar="X",
            help=f"chance that a draw reduces it (default: {getattr(usual, axis):g})",
        )
    of_full = (
        "steps that run the full network; others draw until something is reduced (default: one "
        "draw, which may reduce nothing)"
    )
    for name, what in (
        ("full", of_full),
        ("prefix", f"reduced depths that keep the first layers (default: {usual.prefix:g})"),
        ("per-layer", f"reduced top-k that is drawn layer by layer (default: {usual.per_layer:g})"),
    ):
        group.add_argument(f"--{name}-share", type=float, metavar="X", help=f"share of {what}")
    group.add_argument(
        "--fixed",
        metavar="NAME",
        help="run this sub-network in every step, such as L9; 'full' trains an inelastic model",
    )
    group.add_argument(
        "--distill",
        type=float,
        metavar="X",
        help="of a reduced network's loss, this share is its divergence from the full network on "
        "the same text (default: 1 with --sandwich, else 0)",
    )
    group.add_argument(
        "--sandwich",
        action="store_true",
        help="every step runs the full network, the smallest and a drawn one, which learn from "
        "the full one unless --distill says otherwise",
    )
    group.add_argument(
        "--split",
        type=float,
        metavar="X",
        help="every step runs the full network on this share of its sequences, rounded to whole "
        "ones, and a drawn reduced network on the others; the chances above then say what a draw "
        "reduces, until there is something (default: one network a step)",
    )


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def share_the_machine() -> None:
    """Have OpenMP's threads wait for microseconds, then sleep; before torch is loaded.

    As they spin by default, steps of a small model take a multiple of their time where anything
    else runs on the machine. `GOMP_SPINCOUNT` in the environment is left as it is.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def check(args: argparse.Namespace) -> None:
    """Refuse values out of their range, and options that have no meaning beside others.

    Raises:
        OptionError: names the option.
    """
    inf = math.inf
    for name, low, high, allowed in (
        ("minutes", 0, 10**7, "at least 0 and at most 10,000,000"),
        ("tokens", 1, inf, "at least 1"),
        ("length", 1, PIECE_TOKENS, f"in [1, {PIECE_TOKENS}]"),
        ("batch_tokens", PIECE_TOKENS, inf, f"at least {PIECE_TOKENS}"),
        ("vocab_size", 300, 2**16, "in [300, 65536]: bytes, marks and words, in 16 bits"),
        ("save_every", 1, inf, "at least 1 step"),
        ("corpus_fraction", math.ulp(0), 1, "above 0 and at most 1"),
        ("library_passes", 0, inf, "at least 0"),
        ("docstring_passes", 0, inf, "at least 0"),
        ("chat_fraction", 0, 0.99, "in [0, 0.99]"),
        ("lr_scale", math.ulp(0), 1000, "above 0 and at most 1000"),
        ("bias_rate", 0, inf, "at least 0"),
        ("balance", 0, inf, "at least 0"),
        ("seed", 0, 2**63 - 1, "in [0, 2^63 - 1]"),
        ("distill", 0, 1, "in [0, 1]"),
        ("split", 0, math.nextafter(1, 0), "in [0, 1); --fixed full leaves nothing to the others"),
        ("full_share", 0, math.nextafter(1, 0), "in [0, 1); --fixed full runs it in every step"),
        ("prefix_share", 0, 1, "in [0, 1]"),
        ("per_layer_share", 0, 1, "in [0, 1]"),
        *((f"reduce_{axis}", 0, 1, "in [0, 1]") for axis in CHANCES),
        *((s.option.replace("-", "_"), 1, s.most, f"in [1, {s.most}]") for s in SIZES),
    ):
        value = getattr(args, name)
        if value is not None and not (low <= value <= high and value < inf):
            raise OptionError(f"{flag(name)} must be {allowed}, got {value}.")
    for name, divides in (("length", PIECE_TOKENS), ("batch_tokens", None)):
        value = getattr(args, name)
        if value is not None and (divides % value if divides else value % PIECE_TOKENS):
            rule = f"divide {divides}" if divides else f"be a multiple of {PIECE_TOKENS}"
            raise OptionError(f"{flag(name)} must {rule}, got {value}.")
    _check_combinations(args)


def _check_combinations(args: argparse.Namespace) -> None:
    sizes = ("model", *(size.option.replace("-", "_") for size in SIZES))
    of_library = ("library_passes", "docstring_passes", "chat_fraction")
    only_library = args.corpus is not None and not args.with_library
    for name, others, why in (
        ("config", (*sizes, "vocab_size", "from"), "the file says what the model is"),
        ("from", (*sizes, "vocab_size", "tokenizer"), "the checkpoint says what the model is"),
        ("stages", ("tokens", "batch_tokens", "length"), "the stages say it"),
        ("fixed", (*(f"reduce_{axis}" for axis in CHANCES), *SHARES), "nothing is drawn"),
        ("sandwich", ("full_share", "split"), "every step runs the full network"),
        ("split", ("full_share",), "every step runs the full network"),
    ):
        given = [other for other in others if _is_given(args, other)]
        if _is_given(args, name) and given:
            raise OptionError(f"leave out {flag(given[0])} where {flag(name)} is given: {why}.")
    for share, axis in (("prefix_share", "depth"), ("per_layer_share", "top_k")):
        if getattr(args, share) is not None and getattr(args, f"reduce_{axis}") == 0:
            raise OptionError(
                f"leave out {flag(share)} where {flag(f'reduce_{axis}')} is 0: no step reduces it."
            )
    for wrong, name, remedy in (
        (args.corpus is None and args.include, "include", "Name one with --corpus DIR"),
        (
            args.corpus is None and args.corpus_fraction is not None,
            "corpus_fraction",
            "Name one with --corpus DIR",
        ),
        (
            args.corpus is None and args.with_library,
            "with_library",
            "Leave it out: the library is read where no --corpus is given",
        ),
        *(
            (only_library and getattr(args, name) is not None, name, "Add --with-library")
            for name in of_library
        ),
    ):
        if wrong:
            what = "the Python library" if "Add" in remedy else "a folder of texts"
            raise OptionError(f"{flag(name)} is about {what}, which is not read. {remedy}.")


def _is_given(args: argparse.Namespace, name: str) -> bool:
    """Whether an option says anything; --split 0 says what is so without it."""
    value = getattr(args, name)
    return value is not None and value is not False and (name, value) != ("split", 0)


def flag(name: str) -> str:
    """'batch_tokens' -> '--batch-tokens'."""
    return f"--{name.replace('_', '-')}"


def filled(args: argparse.Namespace) -> argparse.Namespace:
    """A copy in which options that were not given have the values that the run takes.

    Those of the model stay as they are, and so do `tokens` where the time or stages decide.
    """
    now = argparse.Namespace(**vars(args))
    usual: dict[str, Any] = {"split": 0.0, "distill": 1.0 if args.sandwich else 0.0}
    if args.stages is None:
        usual |= {"batch_tokens": BATCH_TOKENS, "length": LENGTH}
        if args.minutes is None:
            usual["tokens"] = TOKENS
    if args.fixed is None:
        usual |= {f"reduce_{axis}": getattr(SamplingPlan(), axis) for axis in CHANCES}
        usual |= {share: getattr(SamplingPlan(), field) for share, field in SHARES.items()}
    mixture, library = Mixture(), args.corpus is None or args.with_library
    if args.corpus is not None:
        usual["corpus_fraction"] = mixture.text_fraction
    if library:
        usual["library_passes"] = mixture.library_passes
        usual["docstring_passes"] = mixture.docstring_passes
        usual["chat_fraction"] = mixture.chat_fraction
    now.with_library = library
    start = getattr(args, "from")
    if start is not None and not (BUNDLED / start).is_dir() and Path(start).exists():
        setattr(now, "from", str(Path(start).resolve()))
    for name, value in usual.items():
        if getattr(now, name) is None:
            setattr(now, name, value)
    return now
