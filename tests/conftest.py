"""Fixtures that several folders share: a tiny random checkpoint, and the bundled model."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch loads OpenMP: a waiting thread spins for microseconds, then sleeps. To spin on, as
# is the default, makes small models tens of times slower on a machine that others use too; sleeping
# at once makes them twice as slow on an idle one. Processes that tests start inherit it.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import torch
from elastic_moe_kernels import native

from elastic_moe.engine import Engine
from elastic_moe.model.checkpoints.folder import BUNDLED
from elastic_moe.model.checkpoints.saving import save_checkpoint
from elastic_moe.model.config import ElasticBlock
from elastic_moe.model.families import write_config
from elastic_moe.model.reference.transformer import ElasticTransformer
from elastic_moe.train.models import ELASTIC_MINI

# Property tests take the same examples in every run, so that a change alone turns one red;
# `make explore` looks at others.
settings.register_profile("fixed", derandomize=True)
settings.register_profile("explore", derandomize=False, print_blob=True)
settings.load_profile("fixed")

TINY = dataclasses.replace(
    ELASTIC_MINI,
    hidden_size=32,
    num_layers=6,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    num_experts=8,
    max_top_k=3,
    expert_hidden=16,
    max_positions=640,
    elastic=ElasticBlock(
        width_granules=4,
        trained={"depth": (2, 3, 4, 5, 6), "top_k": (1, 2, 3), "width": (2, 4), "pool": (4, 8)},
    ),
)


@pytest.fixture
def threads() -> Iterator[None]:
    """For tests that set the number of threads: kernels use them, however busy the machine is."""
    before = torch.get_num_threads()
    if not native.missing():
        native.extension().assume_free_cores(64)
    yield
    torch.set_num_threads(before)
    if not native.missing():
        native.extension().assume_free_cores(0)


def random_model(config: object = TINY, seed: int = 0) -> ElasticTransformer:
    """A tiny model whose routing is not flat and whose layers all matter."""
    model = ElasticTransformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.uniform_(0.5, 1.5, generator=generator)
            else:
                p.normal_(std=0.2, generator=generator)
    return model


def make_tiny_folder(folder: Path) -> Path:
    """Save a checkpoint folder with a tiny random model and the bundled tokenizer."""
    bundled = BUNDLED / "elastic-mini"
    special = json.loads((bundled / "config.json").read_text())
    config = write_config(
        TINY,
        bos_id=special["bos_token_id"],
        eos_ids=special["eos_token_id"],
        pad_id=special["pad_token_id"],
    )
    save_checkpoint(folder, dict(random_model().named_parameters()), config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled / name, folder / name)
    return folder


@pytest.fixture(autouse=True)
def fixed_draws() -> None:
    """What a test draws depends neither on the tests before it nor on the process it runs in."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a folder."""
    return make_tiny_folder(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Engine:
    return Engine.from_pretrained(tiny_folder, dtype="float32")


@pytest.fixture(scope="session")
def mini() -> Engine:
    """The bundled super-network."""
    return Engine.from_pretrained("elastic-mini")
