"""From options to what a run is made of: model, text and plan. Nothing is written here."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from elastic_moe.errors import (
    CheckpointError,
    CorpusError,
    OptionError,
    RoutingError,
    TrainingError,
)
from elastic_moe.model.checkpoints.folder import BUNDLED, find_checkpoint
from elastic_moe.routing import parse_name
from elastic_moe.train.experts.native import choose_backend
from elastic_moe.train.export import check_target
from elastic_moe.train.models import (
    MODELS,
    SIZES,
    SMALL,
    Model,
    model_from_checkpoint,
    model_from_file,
    sized_model,
)
from elastic_moe.train.options import CHANCES, SHARES, check, filled, flag
from elastic_moe.train.runs.folder import (
    OPTIONS,
    check_config,
    check_folder,
    check_recorded,
    to_record,
)
from elastic_moe.train.step.plan import PIECE_TOKENS, Stage, TrainingPlan, parse_stages
from elastic_moe.train.step.sampling import SamplingPlan
from elastic_moe.train.text.corpus import Listing, SourceFile, text_files
from elastic_moe.train.text.prepare import (
    MANIFEST,
    TOKENIZER,
    Mixture,
    check_options,
    read_manifest,
)
from elastic_moe.train.text.tokens import check_tokenizer

PLAN = "plan.json"
CHECKPOINT = "checkpoint"  # in the folder of a run
WARMUP_STEPS, SHORT_WARMUP_STEPS = 100, 20  # of random weights, and of trained ones


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run is made of.

    Attributes:
        args: its options, filled.
        model: what is trained.
        tokenizer: a given one; None trains one.
        texts: files besides the library.
        mixture: how much of each kind of text is read.
        plan: of the run; None while the time box has not decided how many steps it has.
        record: what `options.json` keeps.
    """

    args: argparse.Namespace
    model: Model
    tokenizer: Tokenizer | None
    texts: Sequence[SourceFile]
    mixture: Mixture
    plan: TrainingPlan | None
    record: dict[str, Any]

    @property
    def out(self) -> Path:
        out: Path = self.args.out
        return out

    @property
    def data(self) -> Path:
        return self.out / "data"

    def with_steps(self, steps: int) -> TrainingPlan:
        """The plan of a run of so many steps."""
        return _plan(self.args, self.model, (_stage(self.args, self.model, steps),))


def read_settings(options: argparse.Namespace) -> Settings:
    """Check options, against each other and against the run that is there.

    Raises:
        OptionError: names the option that is wrong.
        CorpusError: what was prepared for the run is damaged.
    """
    check(options)
    args = filled(options)
    out: Path = args.out
    check_folder(out)
    prepared = out / "data" / MANIFEST
    manifest = read_manifest(prepared.parent)[0] if prepared.exists() else None
    with _as_option_errors():
        check_target(out / CHECKPOINT)
        tokenizer = _tokenizer(args, out)
        model = _model(args, out, tokenizer)
        _check_reductions(options, model)
        if tokenizer is not None:
            check_tokenizer(tokenizer, model.config.vocab_size)
        record = to_record(args, _sizes(model), model.raw)
        check_recorded(out, record)
        if model.start is None or not (out / OPTIONS).is_file():  # else it was read there
            check_config(out, model.raw, "--config" if model.start is None else "--from")
        texts = text_files(args.corpus, args.include, out) if args.corpus is not None else ()
        mixture = _mixture(args)
        if manifest is not None:
            check_options(
                out / "data",
                manifest,
                seed=args.seed,
                library=args.with_library,
                files=texts,
                mixture=mixture,
                tokenizer=tokenizer,
                vocab_size=model.config.vocab_size,
            )
        plan = _plan(args, model, stages) if (stages := _stages(args, model, out)) else None
        trial = plan or _plan(args, model, (_stage(args, model, 1),))
        check_device(args.device)
        choose_backend(args.backend, model.config, trial, torch.device(args.device))
    return Settings(args, model, tokenizer, texts, mixture, plan, record)


@contextmanager
def _as_option_errors() -> Iterator[None]:
    """What is wrong with the arguments is told as such, whoever finds it."""
    try:
        yield
    except (CorpusError, CheckpointError, RoutingError, TrainingError) as error:
        raise error if isinstance(error, OptionError) else OptionError(str(error)) from None


def _tokenizer(args: argparse.Namespace, out: Path) -> Tokenizer | None:
    begun = out / "data" / TOKENIZER
    name = getattr(args, "from") or args.tokenizer
    if name is None:
        return None
    if getattr(args, "from") and (out / OPTIONS).is_file() and begun.is_file():
        path = begun  # the checkpoint may have gone since
    elif Path(name).is_file():
        path = Path(name)
    else:
        is_checkpoint = (BUNDLED / name).is_dir() or Path(name).is_dir() or getattr(args, "from")
        path = find_checkpoint(name) / TOKENIZER if is_checkpoint else Path(name)
    try:
        tokenizer: Tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001  (the library raises nothing narrower)
        raise CorpusError(f"{path} is no tokenizer.json: {error}.") from None
    # Of a model that reads no more at once; here they would cut texts, or fill them up.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _model(args: argparse.Namespace, out: Path, tokenizer: Tokenizer | None) -> Model:
    start = getattr(args, "from")
    if start is not None and (out / OPTIONS).is_file():
        return replace(model_from_checkpoint(str(out.resolve())), start=start)  # no bundled one
    if start is not None:
        return model_from_checkpoint(start)
    if args.config is not None:
        return model_from_file(args.config)
    vocab_size = args.vocab_size
    if vocab_size is None and tokenizer is not None:
        vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    given = {size.field: getattr(args, size.option.replace("-", "_")) for size in SIZES}
    return sized_model(
        args.model or SMALL,
        {field: value for field, value in given.items() if value is not None},
        vocab_size or MODELS[SMALL].vocab_size,
    )


def _sizes(model: Model) -> dict[str, Any]:
    """The model's sizes by option."""
    config = model.config
    sizes = {s.option.replace("-", "_"): getattr(config, s.field) for s in SIZES}
    return {"vocab_size": config.vocab_size, **sizes}


def _check_reductions(options: argparse.Namespace, model: Model) -> None:
    """Refuse what was asked to be reduced where the model has but one of it."""
    for axis, what in _irreducible(model).items():
        name = f"reduce_{axis}"
        value = getattr(options, name)
        if value:
            raise OptionError(
                f"{flag(name)} must be 0 for a model of one {what}, got {value}: there is nothing "
                f"to reduce. Leave it out, or train a model that has more."
            )


def _irreducible(model: Model) -> dict[str, str]:
    """The axes along which there is nothing to reduce, and what the model has but one of."""
    config = model.config
    sizes = (
        ("depth", config.num_layers, "layer"),
        ("pool", config.num_experts, "expert"),
        ("top_k", config.max_top_k, "expert per token"),
        ("width", config.width_granules, "granule"),
        ("threshold", config.max_top_k, "expert per token"),
    )
    return {axis: what for axis, most, what in sizes if most == 1}


def _mixture(args: argparse.Namespace) -> Mixture:
    usual = Mixture()
    with_library: bool = args.with_library
    return Mixture(
        text_fraction=args.corpus_fraction or usual.text_fraction,
        library_passes=args.library_passes if with_library else usual.library_passes,
        docstring_passes=args.docstring_passes if with_library else usual.docstring_passes,
        chat_fraction=args.chat_fraction if with_library else 0.0,
    )


def _stages(args: argparse.Namespace, model: Model, out: Path) -> tuple[Stage, ...] | None:
    """The stages that the options say, or those of the run that a time box began; None: not yet."""
    if args.stages is not None:
        return parse_stages(args.stages)
    if args.tokens is not None:
        return (_stage(args, model, -(-args.tokens // args.batch_tokens)),)
    path = out / PLAN
    if not path.is_file():
        return None
    try:
        return TrainingPlan.from_json(json.loads(path.read_text(encoding="utf-8"))).stages
    except (ValueError, TrainingError) as error:
        raise OptionError(
            f"{path} is torn ({error}). It says how long the run is: begin another one in another "
            f"folder with --out."
        ) from None


def _stage(args: argparse.Namespace, model: Model, steps: int) -> Stage:
    """The one stage of a run whose options say no stages."""
    if args.split and args.batch_tokens < 2 * args.length:
        raise OptionError(
            f"--split needs steps of at least 2 sequences, got --batch-tokens {args.batch_tokens} "
            f"and --length {args.length}. Make one of them larger or the other one smaller."
        )
    pieces = args.batch_tokens // PIECE_TOKENS
    return Stage(steps, model.config.num_layers, pieces, args.length)


def _plan(args: argparse.Namespace, model: Model, stages: tuple[Stage, ...]) -> TrainingPlan:
    shape = model.config.shape
    if args.fixed is not None:
        parse_name(shape, args.fixed)
        sampling = SamplingPlan(fixed=args.fixed)
    else:
        chances = {axis: getattr(args, f"reduce_{axis}") for axis in CHANCES}
        chances |= dict.fromkeys(_irreducible(model), 0.0)
        shares = {field: getattr(args, share) for share, field in SHARES.items()}
        sampling = SamplingPlan(**chances, **shares)
    steps = sum(stage.steps for stage in stages)
    most = WARMUP_STEPS if model.start is None else SHORT_WARMUP_STEPS
    plan = TrainingPlan(
        stages=stages,
        sampling=sampling,
        seed=args.seed,
        warmup_steps=max(1, min(most, steps // 10)),
        save_every_steps=args.save_every,
        distill=args.distill,
        sandwich=args.sandwich,
        split=args.split,
        bias_rate=args.bias_rate,
        balance=args.balance,
        dtype=args.dtype,
    )
    plan.check_model(model.config)
    return replace(plan, muon_lr=plan.muon_lr * args.lr_scale, adam_lr=plan.adam_lr * args.lr_scale)


def check_device(device: str) -> None:
    """Refuse a device that is not there.

    Raises:
        OptionError: says why it cannot be used.
    """
    try:
        torch.zeros(1, device=device).item()  # which 'meta' has not
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"--device {device} cannot be used here: {reason}") from None


def describe_texts(settings: Settings) -> str | None:
    """What is read of --corpus, and what is not; None without."""
    if not isinstance(settings.texts, Listing):
        return None
    return f"{settings.args.corpus}: {settings.texts.describe()}"
