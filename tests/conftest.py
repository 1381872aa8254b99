"""Fixtures that several folders share: a tiny random checkpoint, and the bundled model."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch loads OpenMP: a waiting thread spins for microseconds, then sleeps. To spin on, as
# is the default, makes small models tens of times slower on a machine that others use too; sleeping
# at once makes them twice as slow on an idle one. Processes that tests start inherit it.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import numpy as np
from elastic_moe_kernels import native
from elastic_moe_kernels.arrays import has_torch
from numpy.typing import NDArray

from elastic_moe.engine import Engine
from elastic_moe.model.checkpoints.folder import BUNDLED
from elastic_moe.model.checkpoints.saving import save_checkpoint
from elastic_moe.model.config import ElasticBlock, ModelConfig
from elastic_moe.model.families import parameter_shapes, write_config
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


class _WithoutTorch(pytest.Module):
    """A module of tests in an install without torch: it is skipped if it imports torch."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        try:
            return super().collect()
        except self.CollectError as error:
            if "No module named 'torch'" in str(error) or "needs torch" in str(error):
                pytest.skip("needs torch, which is not installed", allow_module_level=True)
            raise


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    if has_torch():
        return None
    module: pytest.Module = _WithoutTorch.from_parent(parent, path=module_path)
    return module


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not has_torch():
        for item in items:
            if item.get_closest_marker("needs_torch"):
                item.add_marker(pytest.mark.skip("needs torch, which is not installed"))


@pytest.fixture
def threads() -> Iterator[None]:
    """For tests that set the number of threads: kernels use them, however busy the machine is."""
    if not native.missing():
        native.extension().assume_free_cores(64)
    yield
    if not native.missing():
        native.extension().assume_free_cores(0)


def random_weights(config: ModelConfig = TINY, seed: int = 7) -> dict[str, NDArray[np.float32]]:
    """Parameters of a tiny model whose routing is not flat and whose layers all matter."""
    rng = np.random.default_rng(seed)
    return {
        name: (
            rng.uniform(0.5, 1.5, shape) if len(shape) == 1 else rng.normal(0, 0.2, shape)
        ).astype(np.float32)
        for name, shape in parameter_shapes(config)
    }


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
    save_checkpoint(folder, random_weights(), config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled / name, folder / name)
    return folder


@pytest.fixture(autouse=True)
def fixed_draws() -> None:
    """What a test draws depends neither on the tests before it nor on the process it runs in."""
    if has_torch():
        import torch

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
