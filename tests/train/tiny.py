"""A model, a plan and a text so small that a step takes milliseconds; and a corpus to prepare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from elastic_moe.train.step.plan import TrainingPlan, parse_stages
from elastic_moe.train.step.sampling import SamplingPlan
from elastic_moe.train.step.trainer import Trainer
from elastic_moe.train.text import corpus
from elastic_moe.train.text.corpus import SourceFile
from elastic_moe.train.text.tokens import TokenStream
from tests.conftest import TINY

CONFIG = replace(TINY, vocab_size=64)
PLAN = TrainingPlan(
    stages=parse_stages("2x6x1x128,6x8x1x128"),
    sampling=SamplingPlan(full=0.4),
    warmup_steps=2,
    save_every_steps=3,
)
# A config.json: a dense layer, then two with routers, correction biases and a shared expert.
ERNIE = {
    "model_type": "ernie4_5_moe",
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_num_shared_experts": 1,
    "moe_layer_start_index": 1,
    "tie_word_embeddings": True,
}


def stream(source: str = "") -> TokenStream:
    """A text whose next token is a fixed function of the last."""
    tokens = np.arange(512 * 40, dtype=np.uint16) * 7 % 61
    return TokenStream(tokens, bos=63, seed=0, source=source)


def trainer(plan: TrainingPlan = PLAN) -> Trainer:
    return Trainer(CONFIG, plan, stream())


def parameters(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def library(root: Path, functions: int = 300) -> Sequence[SourceFile]:
    """A library of one module, and nothing else."""
    folder = root / "library"
    folder.mkdir()
    text = "".join(
        f'def function_{n}():\n    """Return the number {n}, which is {n}."""\n    return {n}\n\n'
        for n in range(functions)
    )
    (folder / "numbers.py").write_text(f'"""Numbers."""\n\n{text}')
    return corpus.library_files(folder)


def novels(root: Path) -> Sequence[SourceFile]:
    """Two novels, one of them held out."""
    folder = root / "novels"
    folder.mkdir()
    (folder / "Dickens_X_1850.txt").write_text("It was the best of times. " * 2000)
    (folder / "Forster_Y_1905.txt").write_text("ZEBRAFORSTER " * 2000)
    return corpus.text_files(folder, hold_out=corpus.HoldOut(patterns=("*forster*",)))
