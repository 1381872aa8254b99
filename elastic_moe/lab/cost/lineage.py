"""The lineage of a network: the trainings that led to its weights, and those of a part alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from elastic_moe.errors import CheckpointError, OptionError
from elastic_moe.lab.cost.training import Training, within
from elastic_moe.model.checkpoints.checkpoint import Checkpoint
from elastic_moe.routing import ModelShape, Subnet
from elastic_moe.train.settings import CHECKPOINT


def join_trainings(training: Training, earlier: Sequence[Training]) -> list[Training]:
    """Every training that led to the weights of `training`, the first one first, each once.

    Name and time of a training come from its own folder; its FLOPs from a manifest, where one
    records them.

    Raises:
        OptionError: an earlier one was of another model, is `training` itself or went on from it,
            appears at two different steps, or has other weights than the next one started from.
    """
    _check_origins(training, earlier)
    shapes = [part.shape for part in (*training.before, training)]
    found: list[Training] = []
    for count, chain in enumerate((*earlier, training)):
        known, end = list(found), len(found)  # no chain holds a training twice
        for part in reversed((*chain.before, replace(chain, before=()))):
            if part.shape not in shapes:
                raise OptionError(
                    f"{part.path} is of another model than {training.path}: "
                    f"{_difference(part.shape, shapes[0])}. Name a training that this one went on "
                    f"from."
                )
            if count < len(earlier) and part.is_same(training):
                raise OptionError(
                    f"{chain.path} is the training of {training.path} itself, or went on from it. "
                    f"Name a training that this one went on from."
                )
            other = next((one for one in known if one.is_same(part)), None)
            if other is None:
                found.insert(end, part)
                continue
            if other.steps != part.steps:
                raise OptionError(
                    f"{other.path} and {part.path} are one training, at step {other.steps:,} "
                    f"and at step {part.steps:,}. Leave out the one that {training.path} did not "
                    f"go on from."
                )
            at = found.index(other)
            best = max(other, part, key=lambda one: (one.timed_steps, bool(one.name)))
            # A manifest holds the count of its time; a run is counted as this version draws. Only
            # the manifest of a successor names what was extracted.
            then = [one.flops for one in (other, part) if one.kind != "run"]
            cut = other.cut or part.cut
            found[at] = replace(best, flops=then[0] if then else best.flops, cut=cut)
            end = min(end, at)
    return found


def _check_origins(training: Training, earlier: Sequence[Training]) -> None:
    """Refuse a training whose weights are not those that the next one started from.

    Checked where the weights still exist, or where the next one started from random ones.
    """
    known = [*training.before, training]
    for candidate in reversed(earlier):
        parts, first = [*candidate.before, candidate], known[0]
        shared = any(one.is_same(part) for one in known for part in parts)
        if not shared and first.parent is None:
            raise OptionError(
                f"{first.path} began with random weights, so that it cannot have gone on from "
                f"{candidate.path}. Leave that one out."
            )
        sha256 = None if shared else _weights_sha256(candidate)
        if sha256 and first.parent and "sha256:" in first.parent and sha256 not in first.parent:
            raise OptionError(
                f"{candidate.path} has other weights (sha256:{sha256}) than those that "
                f"{first.path} began with: {first.parent}. Name the training of those."
            )
        known = [*parts, *known]


def _weights_sha256(training: Training) -> str | None:
    """SHA-256 of the weights that a training saved; None where they are gone."""
    for folder in (training.path, training.path / CHECKPOINT):
        try:
            return Checkpoint(folder).files.sha256()
        except (CheckpointError, OSError):
            continue
    return None


def _difference(shape: ModelShape, other: ModelShape) -> str:
    """The first sizes that differ, in words."""
    return ", ".join(_differences(shape, other)) or "its layers are of other kinds"


def _differences(shape: ModelShape, other: ModelShape) -> Iterator[str]:
    for size in ("num_layers", "hidden_size", "num_experts", "max_top_k", "width_granules"):
        mine, others = getattr(shape, size), getattr(other, size)
        if mine != others:
            yield f"{size} {mine} instead of {others}"


def split_trainings(
    parts: Sequence[Training],
) -> tuple[list[Training], list[Training], Subnet | None]:
    """The trainings of the super-network, those after it of a part alone, and that part.

    The part is a sub-network that was extracted, or the only one that every step trained; None
    where there is none.
    """
    cuts = [i for i, part in enumerate(parts) if part.cut is not None]
    count = cuts[0] + 1 if cuts else len(parts)
    while count > 1 and parts[count - 1].alone is not None:
        count -= 1
    own = None if count == len(parts) else parts[-1].alone
    for i in reversed(cuts):
        cut = parts[i].cut
        own = cut if own is None or cut is None else within(cut, own)
    return list(parts[:count]), list(parts[count:]), own
