"""From a configuration to what a run is made of: model, text and plan. Writes nothing."""

from __future__ import annotations

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
from elastic_moe.routing.axes import THRESHOLD, TOP_K, TRAINED
from elastic_moe.train.config import SHARES, TrainConfig, flag_of_axis
from elastic_moe.train.experts.native import choose_backend
from elastic_moe.train.export import check_target
from elastic_moe.train.models import (
    DEFAULT_MODEL,
    MODELS,
    SIZES,
    Model,
    model_from_checkpoint,
    model_from_file,
    sized_model,
)
from elastic_moe.train.runs.folder import (
    OPTIONS,
    check_config,
    check_folder,
    check_recorded,
    to_record,
)
from elastic_moe.train.step.plan import PLAN, Stage, TrainingPlan, parse_stages
from elastic_moe.train.step.sampling import AXES, SamplingPlan
from elastic_moe.train.text import PIECE_TOKENS
from elastic_moe.train.text.corpus import Listing, SourceFile, text_files
from elastic_moe.train.text.prepare import MANIFEST, TOKENIZER, check_options, read_manifest
from elastic_moe.train.text.tokens import check_tokenizer

CHECKPOINT = "checkpoint"  # in the folder of a run
WARMUP_STEPS, SHORT_WARMUP_STEPS = 100, 20  # of random weights, and of trained ones


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that a run is made of.

    Attributes:
        config: what the user asked for.
        model: that is trained.
        tokenizer: a given one; None trains one.
        texts: files besides the library.
        plan: of the run; None while the time box has not decided how many steps it has.
        record: what `options.json` keeps.
    """

    config: TrainConfig
    model: Model
    tokenizer: Tokenizer | None
    texts: Sequence[SourceFile]
    plan: TrainingPlan | None
    record: dict[str, Any]

    @property
    def out(self) -> Path:
        return self.config.out

    @property
    def data(self) -> Path:
        return self.out / "data"

    def with_steps(self, steps: int) -> TrainingPlan:
        """The plan of a run of so many steps."""
        return _plan(self.config, self.model, (_stage(self.config, self.model, steps),))


def read_settings(config: TrainConfig) -> Settings:
    """Check a configuration against its model, its texts and the run that is there.

    Raises:
        OptionError: names the option that is wrong.
        CorpusError: what was prepared for the run is damaged.
    """
    out = config.out
    check_folder(out)
    prepared = out / "data" / MANIFEST
    manifest = read_manifest(prepared.parent)[0] if prepared.exists() else None
    start = _start(config)
    with _as_option_errors():
        check_target(out / CHECKPOINT)
        tokenizer = _tokenizer(config, start)
        model = _model(config, start, tokenizer)
        _check_reductions(config, model)
        if tokenizer is not None:
            check_tokenizer(tokenizer, model.config.vocab_size)
        record = to_record(config, start, _sizes(model), model.raw)
        check_recorded(out, record)
        if start is None or not (out / OPTIONS).is_file():  # else it was read there
            check_config(out, model.raw, "--config" if start is None else "--from")
        texts: Sequence[SourceFile] = ()
        if config.corpus is not None:
            texts = text_files(config.corpus, config.include, out, config.held_out)
        if manifest is not None:
            check_options(
                out / "data",
                manifest,
                seed=config.seed,
                library=config.reads_library,
                files=texts,
                mixture=config.mixture,
                tokenizer=tokenizer,
                vocab_size=model.config.vocab_size,
            )
        plan = _plan(config, model, stages) if (stages := _stages(config, model)) else None
        trial = plan or _plan(config, model, (_stage(config, model, 1),))
        check_device(config.device)
        choose_backend(config.backend, model.config, torch.device(config.device), trial.dtype)
    return Settings(config, model, tokenizer, texts, plan, record)


def _start(config: TrainConfig) -> str | None:
    """The checkpoint that a run starts from; of a folder its whole path, wherever one stands."""
    start = config.from_checkpoint
    if start is not None and not (BUNDLED / start).is_dir() and Path(start).exists():
        return str(Path(start).resolve())
    return start


@contextmanager
def _as_option_errors() -> Iterator[None]:
    """Raise every error about an argument as an `OptionError`, whichever function finds it."""
    try:
        yield
    except OptionError:
        raise
    except (CorpusError, CheckpointError, RoutingError, TrainingError) as error:
        raise OptionError(str(error)) from None


def _tokenizer(config: TrainConfig, start: str | None) -> Tokenizer | None:
    own = config.out / "data" / TOKENIZER
    name = start or config.tokenizer
    if name is None:
        return None
    if start and (config.out / OPTIONS).is_file() and own.is_file():
        path = own  # the checkpoint may have gone since
    elif Path(name).is_file():
        path = Path(name)
    else:
        is_checkpoint = (BUNDLED / name).is_dir() or Path(name).is_dir() or start
        path = find_checkpoint(name) / TOKENIZER if is_checkpoint else Path(name)
    try:
        tokenizer: Tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001  (the library raises nothing narrower)
        raise CorpusError(f"{path} is no tokenizer.json: {error}.") from None
    # Of a model that reads no more at once; here they would cut texts, or fill them up.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _model(config: TrainConfig, start: str | None, tokenizer: Tokenizer | None) -> Model:
    if start is not None and (config.out / OPTIONS).is_file():
        own = model_from_checkpoint(str(config.out.resolve()))  # a path: no bundled model's name
        return replace(own, start=start)
    if start is not None:
        return model_from_checkpoint(start)
    if config.config is not None:
        return model_from_file(config.config)
    vocab_size = config.vocab_size
    if vocab_size is None and tokenizer is not None:
        vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    given = {field: getattr(config, name) for name, field in SIZES.items()}
    return sized_model(
        config.model or DEFAULT_MODEL,
        {field: value for field, value in given.items() if value is not None},
        vocab_size or MODELS[DEFAULT_MODEL].vocab_size,
    )


def _sizes(model: Model) -> dict[str, Any]:
    """The model's sizes by option."""
    sizes = {name: getattr(model.config, field) for name, field in SIZES.items()}
    return {"vocab_size": model.config.vocab_size, **sizes}


def _check_reductions(config: TrainConfig, model: Model) -> None:
    """Refuse to reduce an axis of which the model has but one."""
    for axis, part in _irreducible(model).items():
        chance = (config.reduce or {}).get(axis)
        if chance:
            raise OptionError(
                f"{flag_of_axis(axis)} must be 0 for a model of one {part}, got {chance}: there "
                f"is nothing to reduce. Leave it out, or train a model that has more."
            )


def _irreducible(model: Model) -> dict[str, str]:
    """The axes along which there is nothing to reduce, and the part that the model has one of."""
    shape = model.config.shape
    counted = {axis: TOP_K if axis == THRESHOLD else axis for axis in TRAINED}  # it drops experts
    return {
        str(axis.trained): axis.part
        for axis, of in counted.items()
        if of.size is not None and of.most(shape) == 1
    }


def _stages(config: TrainConfig, model: Model) -> tuple[Stage, ...] | None:
    """The stages that the options say, or those that a time box has fixed before; None: not yet."""
    if config.stages is not None:
        return parse_stages(config.stages)
    if config.total_tokens is not None:
        return (_stage(config, model, -(-config.total_tokens // config.step_tokens)),)
    path = config.out / PLAN
    if not path.is_file():
        return None
    try:
        return TrainingPlan.from_json(json.loads(path.read_text(encoding="utf-8"))).stages
    except (ValueError, TrainingError) as error:
        raise OptionError(
            f"{path} is torn ({error}). It says how long the run is: start another one in another "
            f"folder with --out."
        ) from None


def _stage(config: TrainConfig, model: Model, steps: int) -> Stage:
    """The one stage of a run whose options say no stages."""
    step_tokens, length = config.step_tokens, config.sequence_tokens
    if config.split and step_tokens < 2 * length:
        raise OptionError(
            f"--split needs steps of at least 2 sequences, got --batch-tokens {step_tokens} "
            f"and --length {length}. Make one of them larger or the other one smaller."
        )
    return Stage(steps, model.config.num_layers, step_tokens // PIECE_TOKENS, length)


def _sampling(config: TrainConfig, model: Model) -> SamplingPlan:
    if config.fixed is not None:
        parse_name(model.config.shape, config.fixed)
        return SamplingPlan(fixed=config.fixed)
    nothing_to_reduce = _irreducible(model)
    fields: dict[str, Any] = {field: config.share(name) for name, field in SHARES.items()}
    for axis in AXES:
        fields[axis] = 0.0 if axis in nothing_to_reduce else config.chance(axis)
    return SamplingPlan(**fields)


def _plan(config: TrainConfig, model: Model, stages: tuple[Stage, ...]) -> TrainingPlan:
    steps = sum(stage.steps for stage in stages)
    most = WARMUP_STEPS if model.start is None else SHORT_WARMUP_STEPS
    plan = TrainingPlan(
        stages=stages,
        sampling=_sampling(config, model),
        seed=config.seed,
        warmup_steps=max(1, min(most, steps // 10)),
        save_every_steps=config.save_every,
        distill=config.distilled_share,
        sandwich=config.sandwich,
        split=config.split or 0.0,
        bias_rate=config.bias_rate,
        balance=config.balance,
        dtype=config.dtype,
    )
    plan.check_model(model.config)
    scale = config.lr_scale
    return replace(plan, muon_lr=plan.muon_lr * scale, adam_lr=plan.adam_lr * scale)


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
    """A line on the files that are read of --corpus, and on those that are not; None without."""
    if not isinstance(settings.texts, Listing):
        return None
    return f"{settings.config.corpus}: {settings.texts.describe()}"
