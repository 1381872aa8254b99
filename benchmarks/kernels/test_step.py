"""One whole step of the standard model: decode up to 64 rows, prefill beyond.

Its weights, 1.8 GB, are cold in every step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from elastic_moe_kernels import native
from numpy.typing import NDArray

from benchmarks.kernels.cases import (
    CHANNELS,
    EXPERTS,
    HEADS,
    HIDDEN,
    LAYERS,
    ROWS,
    STANDARD,
    TOP_K,
    VOCAB,
    relative_error,
    standard_model,
)
from benchmarks.kernels.conftest import Report
from elastic_moe.config import resolve_routing
from elastic_moe.engine.running.native import NativeRunner
from elastic_moe.engine.running.reference import ReferenceRunner
from elastic_moe.lab.bench.batch import Batch
from elastic_moe.lab.bench.bench import random_ids
from elastic_moe.model.checkpoints.saving import save_checkpoint

CONTEXT = 64
MAX_DECODE_ROWS = 64
MAX_ERROR = 0.1
CONFIG = {
    "model_type": "olmoe",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": CHANNELS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": STANDARD.max_positions,
    "norm_topk_prob": False,
    "tie_word_embeddings": False,
}


@dataclass
class Batches:
    """The standard model on both runners."""

    cpu: Batch
    reference: Batch


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> Batches:
    model = standard_model()
    folder = tmp_path_factory.mktemp("standard")
    save_checkpoint(folder, dict(model.named_parameters()), CONFIG)
    native = NativeRunner(folder)
    (folder / "model.safetensors").unlink()  # large
    return Batches(
        Batch(native, max_new_tokens=512), Batch(ReferenceRunner(model), max_new_tokens=512)
    )


@pytest.mark.parametrize(
    ("implementation", "subnet", "rows"),
    [("cpu", subnet, rows) for subnet in ("full", "k4", "w4") for rows in ROWS]
    + [("reference", "full", rows) for rows in (1, 4, 512)],
)
def test_step(
    measure: Report, batches: Batches, implementation: str, subnet: str, rows: int
) -> None:
    batch: Batch = getattr(batches, implementation)
    assert batch.backend == implementation
    assert batch.level == (native.level() if implementation == "cpu" else None)
    chosen = resolve_routing(STANDARD.shape, subnet)
    ids = random_ids(4096, VOCAB)
    decoding = rows <= MAX_DECODE_ROWS
    # Sequences that share nothing: alike ones would choose the same experts.
    apart = [ids[CONTEXT * i : CONTEXT * (i + 1)] for i in range(rows)]
    contexts = apart if decoding else [ids[:rows]]

    check = [ids[:16]]
    error = relative_error(
        torch.from_numpy(batch.start(check, chosen)),
        torch.from_numpy(batches.reference.start(check, chosen)).double(),
    )
    assert error < MAX_ERROR

    batches.cpu.start(contexts, chosen)
    if decoding:
        batches.cpu.decode(ids[:rows])
    work = batches.cpu.work()
    assert work is not None
    if decoding:
        batch.start(contexts, chosen)

    def call() -> NDArray[np.float32]:
        return batch.decode(ids[:rows]) if decoding else batch.start(contexts, chosen)

    measure(
        call,
        kernel="step",
        implementation=implementation,
        rows=rows,
        moved_bytes=work.touched_bytes,
        flops=work.flops,
        cache="cold",
        subnet=subnet,
        phase="decode" if decoding else "prefill",
        error=error,
    )
