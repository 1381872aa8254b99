"""What a user asks of a training run: every field with its default, unit, range and option.

The command line is made from these fields (`options.py`): an option is described here and nowhere
else. Loads neither torch nor numpy. The file is long because every option is explained here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, get_args, get_type_hints

from elastic_moe.errors import OptionError
from elastic_moe.model.families import FAMILIES
from elastic_moe.model.families.config_keys import MAX_EXPERTS, MAX_LAYERS, MAX_SIZE
from elastic_moe.routing.axes import DEPTH, KEYS, TOP_K, find
from elastic_moe.sizes import parse_size
from elastic_moe.train.models import DEFAULT_MODEL, MODELS, SIZES
from elastic_moe.train.step.plan import BALANCE, DTYPES, SAVE_EVERY_STEPS
from elastic_moe.train.step.sampling import AXES, SamplingPlan
from elastic_moe.train.text import PIECE_TOKENS
from elastic_moe.train.text.corpus import HoldOut, Mixture

TOKENS = 3_000_000  # about one pass over the Python library
BATCH_TOKENS, LENGTH = 2048, 256
SHARD_SIZE = "5GB"
BACKENDS = ("auto", "reference", "cpu")
# Fields of the sampling plan by field of the configuration.
SHARES = {"full_share": "full", "prefix_share": "prefix", "per_layer_share": "per_layer"}

_BELOW_1 = math.nextafter(1, 0)
_ABOVE_0 = math.ulp(0)
_TITLES = [family.title for family in FAMILIES.values()]
_MIXTURE, _SAMPLING, _MODEL = Mixture(), SamplingPlan(), MODELS[DEFAULT_MODEL]


# Headings of --help.
HOW_LONG, TEXT, MODEL, ELASTICITY = "how long", "text", "model", "elasticity"
MACHINE = "optimisation and machine"


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`, both included; `words` follow "must be" in errors."""

    low: float
    high: float
    words: str

    def holds(self, value: Any, kind: Any) -> bool:
        numbers = int if kind is int else (int, float)
        number = isinstance(value, numbers) and not isinstance(value, bool)
        return number and self.low <= value <= self.high and value < math.inf


FRACTION = Range(0, 1, "in [0, 1]")
AT_LEAST_0 = Range(0, math.inf, "at least 0")
AT_LEAST_1 = Range(1, math.inf, "at least 1")


@dataclass(frozen=True, slots=True)
class Option:
    """How the command line shows a field, and which values the field takes.

    Attributes:
        help: what it does, with unit and default.
        group: the heading that it stands under; "" for none.
        metavar: of its value.
        range: of a number; None for no number.
        flag: its name; "" for that of the field.
        choices: every value that it takes; () for any.
    """

    help: str
    group: str
    metavar: str | None = None
    range: Range | None = None
    flag: str = ""
    choices: tuple[str, ...] = ()


def _size(name: str, words: str, most: int = MAX_SIZE) -> Option:
    usual = getattr(_MODEL, SIZES[name])
    return Option(f"{words} (default: {usual})", MODEL, "N", Range(1, most, f"in [1, {most}]"))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """What a user asks of a run; each field's help is its documentation.

    None stands for a default that depends on other fields. The numbers that a run takes then are
    the properties at the end.

    Raises:
        OptionError: a value is out of its range, or fields contradict each other. Names fields as
            the command line does: `--batch-tokens` is `batch_tokens`.
    """

    out: Annotated[
        Path,
        Option(
            "folder of the run; a run that is there is resumed (default: %(default)s)", "", "DIR"
        ),
    ] = Path("train-out")

    minutes: Annotated[
        float | None,
        Option(
            "time box, preparing the text included. Alone it decides how many steps the run has, "
            "from the time of a few; with --tokens or --stages it only ends this start of the run",
            HOW_LONG,
            "M",
            range=Range(0, 10**7, "at least 0 and at most 10,000,000"),
        ),
    ] = None
    tokens: Annotated[
        int | None,
        Option(f"tokens to train on (default: {TOKENS:,})", HOW_LONG, "N", range=AT_LEAST_1),
    ] = None
    batch_tokens: Annotated[
        int | None,
        Option(
            f"tokens of a step, a multiple of {PIECE_TOKENS} (default: {BATCH_TOKENS})",
            HOW_LONG,
            "N",
            range=Range(PIECE_TOKENS, math.inf, f"at least {PIECE_TOKENS}"),
        ),
    ] = None
    length: Annotated[
        int | None,
        Option(
            f"tokens of a sequence, a divisor of {PIECE_TOKENS} (default: {LENGTH})",
            HOW_LONG,
            "N",
            range=Range(1, PIECE_TOKENS, f"in [1, {PIECE_TOKENS}]"),
        ),
    ] = None
    stages: Annotated[
        str | None,
        Option(
            "instead of the three above: LAYERSxSTEPSxPIECESxLENGTH,... of a network that grows "
            f"from stage to stage; a piece is {PIECE_TOKENS} tokens",
            HOW_LONG,
            "LIST",
        ),
    ] = None

    corpus: Annotated[
        Path | None,
        Option(
            "read every UTF-8 text below DIR instead of the Python library; hidden files and files "
            "with NUL bytes are skipped",
            TEXT,
            "DIR",
        ),
    ] = None
    include: Annotated[
        tuple[str, ...],
        Option("of DIR only files like this, such as '*.md'; may be repeated", TEXT, "PATTERN"),
    ] = ()
    hold_out: Annotated[
        tuple[str, ...],
        Option(
            "of DIR no files like this, nor any below folders like this, such as '*Forster*', "
            "letter case aside; may be repeated. The manifest of the run lists them",
            TEXT,
            "PATTERN",
        ),
    ] = ()
    hold_out_texts: Annotated[
        tuple[Path, ...],
        Option(
            "of DIR no copies of the text in this file or folder, nor texts with a part of it; "
            "may be repeated",
            TEXT,
            "PATH",
            flag="--hold-out-text",
        ),
    ] = ()
    with_library: Annotated[bool, Option("read the Python library besides DIR", TEXT)] = False
    corpus_fraction: Annotated[
        float | None,
        Option(
            f"read this share of DIR's texts, evenly (default: {_MIXTURE.text_fraction:g})",
            TEXT,
            "X",
            range=Range(_ABOVE_0, 1, "above 0 and at most 1"),
        ),
    ] = None
    library_passes: Annotated[
        int | None,
        Option(
            "times that the library's sources are in the text "
            f"(default: {_MIXTURE.library_passes})",
            TEXT,
            "N",
            range=AT_LEAST_0,
        ),
    ] = None
    docstring_passes: Annotated[
        int | None,
        Option(
            "times that the library's docstrings are in the text "
            f"(default: {_MIXTURE.docstring_passes})",
            TEXT,
            "N",
            range=AT_LEAST_0,
        ),
    ] = None
    chat_fraction: Annotated[
        float | None,
        Option(
            "share of chats about the library's docstrings "
            f"(default: {_MIXTURE.chat_fraction:g}; 0 without the library)",
            TEXT,
            "X",
            range=Range(0, 0.99, "in [0, 0.99]"),
        ),
    ] = None
    tokenizer: Annotated[
        str | None,
        Option("tokenizer.json, or a checkpoint that has one, instead of a new one", TEXT, "FILE"),
    ] = None
    vocab_size: Annotated[
        int | None,
        Option(
            "tokens that the model and a new tokenizer know "
            f"(default: {_MODEL.vocab_size}, or as many as --tokenizer has)",
            TEXT,
            "N",
            range=Range(300, 2**16, "in [300, 65536]: bytes, marks and words, in 16 bits"),
        ),
    ] = None

    model: Annotated[
        str | None,
        Option(
            f"shape that the sizes below change: {' or '.join(sorted(MODELS))} "
            f"(default: {DEFAULT_MODEL})",
            MODEL,
            "NAME",
            choices=tuple(sorted(MODELS)),
        ),
    ] = None
    layers: Annotated[int | None, _size("layers", "layers", MAX_LAYERS)] = None
    hidden: Annotated[int | None, _size("hidden", "hidden size")] = None
    experts: Annotated[int | None, _size("experts", "experts per layer", MAX_EXPERTS)] = None
    top_k: Annotated[int | None, _size("top_k", "experts per token")] = None
    expert_hidden: Annotated[
        int | None, _size("expert_hidden", "hidden channels of each expert")
    ] = None
    granules: Annotated[
        int | None, _size("granules", "parts that an expert's width can be cut into")
    ] = None
    heads: Annotated[int | None, _size("heads", "query heads")] = None
    kv_heads: Annotated[int | None, _size("kv_heads", "key and value heads")] = None
    head_dim: Annotated[int | None, _size("head_dim", "channels of a head")] = None
    positions: Annotated[int | None, _size("positions", "the longest context, in tokens")] = None
    config: Annotated[
        Path | None,
        Option(
            f"Hugging Face config.json instead, of {' or '.join(_TITLES)}, with tied embeddings",
            MODEL,
            "FILE",
        ),
    ] = None
    from_checkpoint: Annotated[
        str | None,
        Option(
            "start with the weights and the tokenizer of a checkpoint, and a fresh optimiser",
            MODEL,
            "CHECKPOINT",
            flag="--from",
        ),
    ] = None

    reduce: Annotated[
        Mapping[str, float] | None,
        Option("chance that a draw reduces it", ELASTICITY, "X", range=FRACTION),
    ] = None
    full_share: Annotated[
        float | None,
        Option(
            "share of steps that run the full network; others draw until something is reduced "
            "(default: one draw, which may reduce nothing)",
            ELASTICITY,
            "X",
            range=Range(0, _BELOW_1, "in [0, 1); --fixed full runs it in every step"),
        ),
    ] = None
    prefix_share: Annotated[
        float | None,
        Option(
            f"share of reduced depths that keep the first layers (default: {_SAMPLING.prefix:g})",
            ELASTICITY,
            "X",
            range=FRACTION,
        ),
    ] = None
    per_layer_share: Annotated[
        float | None,
        Option(
            "share of reduced top-k that is drawn layer by layer "
            f"(default: {_SAMPLING.per_layer:g})",
            ELASTICITY,
            "X",
            range=FRACTION,
        ),
    ] = None
    fixed: Annotated[
        str | None,
        Option(
            "run this sub-network in every step, such as L9; 'full' trains an inelastic model",
            ELASTICITY,
            "NAME",
        ),
    ] = None
    distill: Annotated[
        float | None,
        Option(
            "of a reduced network's loss, this share is its divergence from the full network on "
            "the same text (default: 1 with --sandwich, else 0)",
            ELASTICITY,
            "X",
            range=FRACTION,
        ),
    ] = None
    sandwich: Annotated[
        bool,
        Option(
            "every step runs the full network, the smallest and a drawn one, which learn from the "
            "full one unless --distill says otherwise",
            ELASTICITY,
        ),
    ] = False
    split: Annotated[
        float | None,
        Option(
            "every step runs the full network on this share of its sequences, rounded to whole "
            "ones, and a drawn reduced network on the others; the chances above then say what a "
            "draw reduces, until there is something (default: one network a step)",
            ELASTICITY,
            "X",
            range=Range(0, _BELOW_1, "in [0, 1); --fixed full leaves nothing to the others"),
        ),
    ] = None

    lr_scale: Annotated[
        float,
        Option(
            "factor on all learning rates (default: %(default)s)",
            MACHINE,
            "X",
            range=Range(_ABOVE_0, 1000, "above 0 and at most 1000"),
        ),
    ] = 1.0
    bias_rate: Annotated[
        float,
        Option(
            "balance the experts by moving their correction biases so far each step, where the "
            "architecture stores them (ERNIE 4.5)",
            MACHINE,
            "X",
            range=AT_LEAST_0,
        ),
    ] = 0.0
    balance: Annotated[
        float,
        Option(
            "weight of the loss that evens out the experts' loads (default: %(default)s)",
            MACHINE,
            "X",
            range=AT_LEAST_0,
        ),
    ] = BALANCE
    seed: Annotated[
        int, Option("default: %(default)s", MACHINE, range=Range(0, 2**63 - 1, "in [0, 2^63 - 1]"))
    ] = 0
    dtype: Annotated[str, Option("of matrix products' inputs", MACHINE, choices=DTYPES)] = "float32"
    device: Annotated[str, Option("cpu or cuda (default: %(default)s)", MACHINE)] = "cpu"
    backend: Annotated[
        str,
        Option(
            "reference: PyTorch alone; cpu: the C++ kernels; auto: cpu where it can run",
            MACHINE,
            choices=BACKENDS,
        ),
    ] = "auto"
    save_every: Annotated[
        int,
        Option(
            "what a crash can lose at most (default: %(default)s)",
            MACHINE,
            "STEPS",
            range=Range(1, math.inf, "at least 1 step"),
        ),
    ] = SAVE_EVERY_STEPS
    max_shard_bytes: Annotated[
        int,
        Option(
            "split the checkpoint's weights beyond it into several files (default: %(default)s)",
            MACHINE,
            "SIZE",
            range=Range(1, math.inf, "at least 1 byte"),
            flag="--max-shard-size",
        ),
    ] = parse_size(SHARD_SIZE)

    def __post_init__(self) -> None:
        for name, option in options().items():
            value = getattr(self, name)
            if name == "reduce":
                self._check_reduce(option)
            elif value is not None:
                _check_value(flag(name), value, kinds()[name], option)
        if self.length is not None and PIECE_TOKENS % self.length:
            raise OptionError(f"--length must divide {PIECE_TOKENS}, got {self.length}.")
        if self.batch_tokens is not None and self.batch_tokens % PIECE_TOKENS:
            raise OptionError(
                f"--batch-tokens must be a multiple of {PIECE_TOKENS}, got {self.batch_tokens}."
            )
        self._check_model()
        self._check_elasticity()
        self._check_text()

    def _check_reduce(self, option: Option) -> None:
        if self.reduce is not None:  # by any spelling of an axis
            given = {_key(axis): chance for axis, chance in self.reduce.items()}
            object.__setattr__(self, "reduce", given)
        for axis, chance in (self.reduce or {}).items():
            if axis not in AXES:
                raise OptionError(f"reduce must name axes of {', '.join(AXES)}, got {axis!r}.")
            _check_value(flag_of_axis(axis), chance, float, option)

    def _check_model(self) -> None:
        sizes = ("model", *SIZES, "vocab_size")
        file, start = "the file says what the model is", "the checkpoint says what the model is"
        self._refuse_beside("config", (*sizes, "from_checkpoint"), file)
        self._refuse_beside("from_checkpoint", (*sizes, "tokenizer"), start)
        self._refuse_beside("stages", ("tokens", "batch_tokens", "length"), "the stages say it")

    def _check_elasticity(self) -> None:
        every_step = "every step runs the full network"
        self._refuse_beside("fixed", ("reduce", *SHARES), "nothing is drawn")
        self._refuse_beside("sandwich", ("full_share", "split"), every_step)
        self._refuse_beside("split", ("full_share",), every_step)
        self._refuse_share("prefix_share", str(DEPTH.trained))
        self._refuse_share("per_layer_share", str(TOP_K.trained))

    def _refuse_share(self, share: str, axis: str) -> None:
        if self._is_given(share) and (self.reduce or {}).get(axis) == 0:
            raise OptionError(
                f"leave out {flag(share)} where {flag_of_axis(axis)} is 0: no step reduces it."
            )

    def _check_text(self) -> None:
        of_texts = ("include", "hold_out", "hold_out_texts", "corpus_fraction", "with_library")
        of_library = ("library_passes", "docstring_passes", "chat_fraction")
        if self.corpus is None and (given := self._given(of_texts)):
            remedy = "Name one with --corpus DIR."
            if given[0] == "with_library":
                remedy = "Leave it out: the library is read where no --corpus is given."
            raise OptionError(
                f"{flag(given[0])} is about a folder of texts, which is not read. {remedy}"
            )
        if not self.reads_library and (given := self._given(of_library)):
            raise OptionError(
                f"{flag(given[0])} is about the Python library, which is not read. "
                f"Add --with-library."
            )

    def _refuse_beside(self, name: str, others: tuple[str, ...], why: str) -> None:
        given = self._given(others)
        if not self._is_given(name) or not given:
            return
        first = flag(given[0])
        if given[0] == "reduce":
            first = flag_of_axis(next(iter(self.reduce or {})))
        raise OptionError(f"leave out {first} where {flag(name)} is given: {why}.")

    def _given(self, names: tuple[str, ...]) -> list[str]:
        return [name for name in names if self._is_given(name)]

    def _is_given(self, name: str) -> bool:
        """Whether a field asks for anything; a split of 0 is what there is without one."""
        value = getattr(self, name)
        if value is None or value is False or value in ((), {}):
            return False
        return not (name == "split" and value == 0)

    @property
    def reads_library(self) -> bool:
        return self.corpus is None or self.with_library

    @property
    def held_out(self) -> HoldOut:
        return HoldOut(self.hold_out, self.hold_out_texts)

    @property
    def total_tokens(self) -> int | None:
        """Tokens of the run; None where its stages or the time box decide."""
        if self.tokens is None and self.stages is None and self.minutes is None:
            return TOKENS
        return self.tokens

    @property
    def step_tokens(self) -> int:
        return self.batch_tokens or BATCH_TOKENS

    @property
    def sequence_tokens(self) -> int:
        return self.length or LENGTH

    @property
    def mixture(self) -> Mixture:
        given: dict[str, Any] = {
            "text_fraction": self.corpus_fraction,
            "library_passes": self.library_passes,
            "docstring_passes": self.docstring_passes,
            "chat_fraction": self.chat_fraction if self.reads_library else 0.0,
        }
        return replace(_MIXTURE, **{k: value for k, value in given.items() if value is not None})

    def chance(self, axis: str) -> float:
        """The chance that a draw reduces an axis, of a model that has something to reduce."""
        usual: float = getattr(_SAMPLING, axis)
        return (self.reduce or {}).get(axis, usual)

    def share(self, name: str) -> float | None:
        """The value of one of `SHARES`, None where a draw may reduce nothing."""
        value: float | None = getattr(self, name)
        usual: float | None = getattr(_SAMPLING, SHARES[name])
        return usual if value is None else value

    @property
    def distilled_share(self) -> float:
        if self.distill is None:
            return 1.0 if self.sandwich else 0.0
        return self.distill


@cache
def options() -> Mapping[str, Option]:
    """Field of `TrainConfig` -> how the command line shows it, in the order of the fields."""
    hints = get_type_hints(TrainConfig, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items()}


@cache
def kinds() -> Mapping[str, Any]:
    """Field of `TrainConfig` -> the type of its value where it is not None."""
    found = get_type_hints(TrainConfig)
    for name, hint in found.items():
        if isinstance(hint, UnionType):
            found[name] = next(kind for kind in get_args(hint) if kind is not NoneType)
    return found


def flag(name: str) -> str:
    """The option of a field: 'batch_tokens' -> '--batch-tokens'."""
    known = options().get(name)
    return (known.flag if known else "") or f"--{name.replace('_', '-')}"


def flag_of_axis(axis: str) -> str:
    """The option of an axis in `reduce`: 'top_k' -> '--reduce-top-k'."""
    return f"--reduce-{axis.replace('_', '-')}"


def _key(axis: str) -> str:
    """The key of an axis in `trained`, from any spelling."""
    return str(find(axis).trained) if axis in KEYS and find(axis).trained else axis


def _check_value(name: str, value: Any, kind: Any, option: Option) -> None:
    if option.choices and value not in option.choices:
        raise OptionError(f"{name} must be one of {', '.join(option.choices)}, got {value!r}.")
    if option.range is not None and not option.range.holds(value, kind):
        raise OptionError(f"{name} must be {option.range.words}, got {value}.")
