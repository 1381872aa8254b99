"""Small models for the C++ step, and sequences to run through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from elastic_moe_kernels.arrays import tensor
from elastic_moe_kernels.step import CpuModel, StepResult
from elastic_moe_kernels.table import SubnetTable, build_table
from torch import Tensor

from elastic_moe.model.config import ElasticBlock
from elastic_moe.model.pack import pack_model
from elastic_moe.model.reference.transformer import ElasticTransformer, Trace
from elastic_moe.model.rotary import rotary_angles
from elastic_moe.routing import Subnet, resolve
from tests.model.random_models import tiny_model

BLOCK = 16


@dataclass(frozen=True)
class Piece:
    """Tokens of one sequence that a step runs."""

    sequence: int
    tokens: tuple[int, ...]
    start: int
    subnet: int


@dataclass
class Runner:
    """A packed model, a cache, and block tables for `sequences` sequences of `positions` each."""

    model: CpuModel
    table: SubnetTable
    sequences: int
    positions: int
    tables: np.ndarray = field(init=False)
    blocks: Tensor = field(init=False)

    def __post_init__(self) -> None:
        per_row = -(-self.positions // BLOCK)
        shape = (self.sequences, self.model.dims.num_layers, per_row)
        ids = np.random.default_rng(0).permutation(int(np.prod(shape)))
        self.tables = np.ascontiguousarray(ids.reshape(shape).astype(np.int32))
        self.blocks = torch.from_numpy(self.model.new_blocks(len(ids)))
        self.blocks.fill_(255)  # NaN

    def step(
        self, pieces: Sequence[Piece], logits_rows: Sequence[int] | None = None, **options: Any
    ) -> StepResult:
        """Run the pieces in one step; logits of every row unless rows are named."""
        arrays = arrays_of(pieces, logits_rows)
        return as_tensors(
            self.model.step(*arrays[:4], self.table, self.blocks, self.tables, arrays[4], **options)
        )


def as_tensors(result: StepResult) -> StepResult:
    """What a step gave, as tensors."""
    return StepResult(*(tensor(v) if isinstance(v, np.ndarray) else v for v in result))


def arrays_of(pieces: Sequence[Piece], logits_rows: Sequence[int] | None) -> list[np.ndarray]:
    """token_ids, positions, sequences, subnets, logits_rows of `CpuModel.step`."""
    rows = [
        (token, piece.start + i, piece.sequence, piece.subnet)
        for piece in pieces
        for i, token in enumerate(piece.tokens)
    ]
    columns = np.array(rows, dtype=np.int32).reshape(-1, 4)
    wanted = range(len(rows)) if logits_rows is None else logits_rows
    return [np.ascontiguousarray(column) for column in columns.T] + [
        np.array(list(wanted), dtype=np.int32)
    ]


def make_model(dtype: torch.dtype, **changes: Any) -> ElasticTransformer:
    """A tiny model whose weights have the dtype, and whose products are rounded to it."""
    model = tiny_model(dtype=torch.float32, **changes)
    if dtype == torch.bfloat16:
        for p in model.parameters():
            if p.dim() > 1:
                p.data = p.data.bfloat16().float()
        model.set_input_dtype(torch.bfloat16)
    return model


def runner_of(
    model: ElasticTransformer,
    subnets: Sequence[Subnet],
    level: str | None = None,
    *,
    sequences: int = 1,
    positions: int = 64,
) -> Runner:
    packed = pack_model(model, level)
    config = model.config
    packed.set_angles(*rotary_angles(config.max_positions, config.head_dim, config.rope_theta))
    return Runner(packed, table_of(subnets), sequences, positions)


def table_of(subnets: Sequence[Subnet]) -> SubnetTable:
    """The kernels' table of sub-networks of one model."""
    shape = subnets[0].shape
    choices = [subnet.layers for subnet in subnets]
    return build_table(choices, shape.num_experts, shape.channels_per_granule)


def run_reference(
    model: ElasticTransformer, subnet: Subnet, tokens: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, list[list[list[int]]]]:
    """Logits (T, V) of the PyTorch model with sums in `dtype`, and per MoE layer the experts."""
    trace = Trace()
    copy = ElasticTransformer(model.config).to(dtype).requires_grad_(False)
    copy.load_state_dict(model.state_dict())
    copy.set_input_dtype(model.input_dtype)
    logits = copy(torch.tensor([list(tokens)]), subnet, trace=trace)[0]
    return logits, [layer.topk_ids.tolist() for layer in trace.layers]


# Changes to the tiny model, each for one thing that architectures do differently.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3-norm-per-head": {},
    "mixtral-no-norm": {"qk_norm": "none"},
    "olmoe-norm-over-heads-unscaled": {"qk_norm": "all", "renormalize": False},
    "ernie": {
        "model_type": "ernie4_5_moe",
        "qk_norm": "none",
        "rope": "interleaved",
        "selection_bias": True,
        "routing_epsilon": 1e-12,
        "dense_layers": frozenset({0}),
        "dense_hidden": 40,
        "shared_hidden": 23,
        "shared_experts": 1,
    },
    "interleaved-with-norm": {"rope": "interleaved"},
    "one-head-each": {"num_kv_heads": 4},
    "one-head-for-all": {"num_kv_heads": 1},
    "untied-head": {"tied_embeddings": False},
    "dense-between": {"dense_layers": frozenset({1, 4}), "dense_hidden": 19},
    "one-expert": {"num_experts": 1, "max_top_k": 1},
    "every-expert-runs": {"num_experts": 5, "max_top_k": 5},
    "prime-sizes": {
        "vocab_size": 103,
        "hidden_size": 37,
        "num_heads": 6,
        "num_kv_heads": 3,
        "head_dim": 14,
        "num_experts": 13,
        "max_top_k": 5,
        "expert_hidden": 35,
        "elastic": ElasticBlock(width_granules=5),
    },
    "odd-everything-dense-and-shared": {
        "hidden_size": 31,
        "head_dim": 10,
        "num_experts": 7,
        "dense_layers": frozenset({2}),
        "dense_hidden": 33,
        "shared_hidden": 17,
        "shared_experts": 1,
        "expert_hidden": 20,
    },
    "wide-heads": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 72},
}


def subnets_of(model: ElasticTransformer) -> list[Subnet]:
    """The whole network, and one that turns every knob."""
    shape = model.shape
    k = max(1, shape.max_top_k - 1)
    pool = list(range(0, shape.num_experts, 2)) if shape.num_experts >= 2 * k else None
    return [
        resolve(shape),
        resolve(
            shape,
            active_layers=[0, 1, 3],
            top_k=k,
            expert_width=[2, 1, 3, 4, 1],
            sparsity_threshold=0.4,
            **({} if pool is None else {"expert_pool": pool}),
        ),
    ]
