"""What a checkpoint has read, and what counting alone makes of the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elastic_moe.errors import BenchmarkError
from elastic_moe.lab.sweeps.text import EvaluationSet
from elastic_moe.model.checkpoints.folder import read_json_if_there
from elastic_moe.train.step.plan import TrainingPlan
from elastic_moe.train.text import PIECE_TOKENS
from elastic_moe.train.text.prepare import MANIFEST, open_stream, read_manifest
from experiments.elastic_mini.bigram import fit_bigram
from experiments.elastic_mini.ngram import MAX_ORDER, fit_kneser_ney


@dataclass(frozen=True, slots=True)
class Training:
    """One of the trainings that led to a checkpoint.

    Attributes:
        steps: that were done, which may be fewer than planned.
        tokens: that they read, again and again where the stream is short.
        tokens_before: that the weights had read before.
        stream_sha256: None where an older export wrote the manifest.
    """

    plan: TrainingPlan
    steps: int
    tokens: int
    tokens_before: int
    stream_sha256: str | None
    stream_tokens: int

    @property
    def different_tokens(self) -> int:
        """Tokens of the stream that were read at least once."""
        return min(self.tokens, self.stream_tokens // PIECE_TOKENS * PIECE_TOKENS)

    def describe(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "different_tokens": self.different_tokens,
            "stream_sha256": self.stream_sha256,
        }


def read_trainings(checkpoint: Path) -> list[Training]:
    """All trainings that a checkpoint's manifest tells of, the first one first; [] without one.

    Raises:
        BenchmarkError: the manifest is not what the export of a training writes.
        CheckpointError: it is no JSON.
    """
    manifest: dict[str, Any] | None = read_json_if_there(checkpoint, MANIFEST)
    found: list[Training] = []
    while manifest:
        try:
            training, corpus = manifest["training"], manifest["corpus"]
            one = Training(
                plan=TrainingPlan.from_json(training["plan"]),
                steps=int(training["steps"]),
                tokens=int(training["tokens"]),
                tokens_before=int(training.get("tokens_before", 0)),
                stream_sha256=corpus.get("stream_sha256"),
                stream_tokens=int(corpus["stream_tokens"]),
            )
            manifest = manifest.get("before")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BenchmarkError(
                f"{checkpoint / MANIFEST} cannot be read ({error!r:.200}). It must hold 'corpus' "
                f"and 'training', as the export of a run writes them. Export the run again."
            ) from None
        found.insert(0, one)
    return found


def choose_training(trainings: Sequence[Training], data: Path) -> Training:
    """The training that the n-grams count the tokens of, if `data` is what it read.

    Args:
        trainings: that led to the checkpoint.
        data: prepared text of one of them.

    Raises:
        BenchmarkError: `data` was not read, or another training read more different tokens; or it
            is not known what the checkpoint has read. An opponent of fewer tokens would be weaker.
    """
    untold = trainings[0].tokens_before if trainings else 0
    if untold or None in {t.stream_sha256 for t in trainings} or not trainings:
        unknown = f"{untold:,} of the tokens" if untold else "the tokens"
        raise BenchmarkError(
            f"--run: the checkpoint has no {MANIFEST} that tells of {unknown} that it has read, so "
            f"nothing can count the same ones. Leave --run out."
        )
    most = max(trainings, key=lambda one: one.different_tokens)
    own = read_manifest(data)[0]["stream_sha256"]
    if own == most.stream_sha256:
        return most
    read = max((t.different_tokens for t in trainings if t.stream_sha256 == own), default=0)
    raise BenchmarkError(
        f"--run: of the text in {data} (stream_sha256 {own}) the checkpoint has read {read:,} "
        f"different tokens. Name the run of {most.steps:,} steps that read the most, "
        f"{most.different_tokens:,}: in the {MANIFEST} of its data, stream_sha256 is "
        f"{most.stream_sha256}."
    )


def opponents(
    data: Path, training: Training, text: EvaluationSet, vocab_size: int
) -> dict[str, Any]:
    """What counting alone makes of a training's tokens: nats per token on the scored ones.

    Args:
        data: the prepared text that it read.

    Returns:
        The best add-k bigram, which counts all tokens, and the best interpolated n-gram of order 1
        to 5, which counts the different ones; and what they counted.
    """
    plan, steps = training.plan, training.steps
    stream = open_stream(data, plan.seed)
    bigram = fit_bigram(stream, plan, steps, vocab_size)
    last = np.concatenate([w.inputs[w.first_scored :] for w in text.windows])
    following = np.concatenate([w.targets[w.first_scored :] for w in text.windows])
    nats, k = min(
        (float(bigram.losses(last, following, k).mean()), k) for k in np.geomspace(1e-3, 1, 13)
    )
    ngram = fit_kneser_ney(stream, plan, steps, vocab_size)
    inputs = np.array([window.inputs for window in text.windows])
    targets = np.array([window.targets for window in text.windows])
    firsts = np.array([window.first_scored for window in text.windows])
    scored = np.arange(targets.shape[1]) >= firsts[:, None]
    orders = {
        order: float(ngram.losses(inputs, targets, order)[scored].mean())
        for order in range(1, MAX_ORDER + 1)
    }
    best = min(orders, key=lambda order: orders[order])
    return {
        "bigram_nats_per_token": nats,
        "bigram_k": float(k),
        "ngram_nats_per_token": orders[best],
        "ngram_order": best,
        "ngrams_counted": training.describe(),
    }


NO_OPPONENTS = dict.fromkeys(
    ("bigram_nats_per_token", "bigram_k", "ngram_nats_per_token", "ngram_order", "ngrams_counted")
)
