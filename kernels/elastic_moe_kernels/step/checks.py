"""Checks of a step's arguments, before the native code takes any address."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from elastic_moe_kernels.columns import SubnetColumns
from elastic_moe_kernels.errors import KernelError
from elastic_moe_kernels.step.weights import LayerTensors, ModelDims

Ints = NDArray[np.int32]

# What the native check of ids answers with; StepRefusal in csrc/bindings/model.h.
REFUSALS = {
    1: "token_ids[{where}] must be in [0, {vocab}], got {value}.",
    2: "positions[{where}] must be in [0, {positions}], which the angles and the block tables "
    "cover, got {value}.",
    3: "sequences[{where}] must be in [0, {sequences}], got {value}.",
    4: "row {where}: the tokens of sequence {value} must be consecutive rows at consecutive "
    "positions.",
    5: "subnets[{where}] must be in [0, {subnets}], got {value}.",
    6: "row {where}: sub-network {value} runs other layers than the one of the row before, which "
    "belongs to the same sequence.",
    7: "block_tables: sequence {where}, layer {detail} must name blocks in [0, {blocks}], "
    "got {value}.",
    8: "logits_rows[{where}] must be in [0, {rows}], got {value}.",
    9: "a step of this model is already running. Make all calls from one thread.",
    11: "row {where}: a batch that advances must have one row of each sequence, sequence {value} "
    "has more.",
    12: "token_ids must have one token for each of the {value} rows, got {where}.",
}


def expect(name: str, got: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Raise `KernelError` unless the shapes are equal."""
    if got != wanted:
        raise KernelError(f"{name} must have shape {wanted}, got {got}.")


def check_arrays(
    dims: ModelDims,
    token_ids: Ints,
    positions: Ints,
    sequences: Ints,
    subnets: Ints,
    block_tables: Ints,
    logits_rows: Ints,
) -> None:
    """Dtypes, shapes and strides; what they hold is for the native code to look at."""
    if block_tables.ndim != 3:
        raise KernelError(f"block_tables must be (S, L, B), got shape {block_tables.shape}.")
    rows = (token_ids.size,)
    for name, array, shape in (
        ("token_ids", token_ids, rows),
        ("positions", positions, rows),
        ("sequences", sequences, rows),
        ("subnets", subnets, rows),
        ("block_tables", block_tables, (len(block_tables), dims.num_layers, block_tables.shape[2])),
        ("logits_rows", logits_rows, (logits_rows.size,)),
    ):
        if array.dtype != np.int32 or array.shape != shape or not array.flags.c_contiguous:
            raise KernelError(
                f"{name} must be contiguous int32 with shape {shape}, got {array.dtype} with "
                f"shape {array.shape}."
            )


def check_states(states_after: Sequence[int], layers: int) -> list[int]:
    """The layer counts after which to copy the stream, ascending in [0, layers]."""
    wanted = list(states_after)
    if wanted != sorted(set(wanted)) or not all(0 <= n <= layers for n in wanted):
        raise KernelError(
            f"states_after must be ascending layer counts in [0, {layers}], got {wanted}."
        )
    return wanted


def check_table(dims: ModelDims, table: SubnetColumns, routing_layers: Iterable[int]) -> None:
    """Raise `KernelError` unless the table belongs to such a model.

    Args:
        routing_layers: the layers that have experts.
    """
    shape = (dims.num_layers, dims.num_experts)
    expect("the table's pool", tuple(table.pool.shape[1:]), shape)
    layers = list(routing_layers)
    idle = (table.active & (table.top_k < 1))[:, layers]  # (S, routing layers)
    if idle.any():
        i = int(idle.any(axis=0).argmax())
        raise KernelError(
            f"sub-network {int(idle[:, i].argmax())}, layer {layers[i]}: top_k must be at "
            f"least 1 in an active layer that has experts, got 0. Make it inactive, or choose one."
        )
    routed = table.active & (table.top_k > 0)
    most = int(table.channels[routed].max()) if routed.any() else 0
    if most > dims.expert_hidden:
        raise KernelError(
            f"channels must be in [1, {dims.expert_hidden}], the experts' hidden size, got {most}."
        )


def check_layer(dims: ModelDims, tensors: LayerTensors) -> None:
    """Norms and biases have the sizes that the model's give them, experts have a router."""
    heads, kv_heads = {
        "none": (0, 0),
        "head": (1, 1),
        "all": (dims.num_heads, dims.num_kv_heads),
    }[dims.qk_norm]
    for name, vector, size in (
        ("attention_norm", tensors.attention_norm, dims.hidden_size),
        ("mlp_norm", tensors.mlp_norm, dims.hidden_size),
        ("q_norm", tensors.q_norm, heads * dims.head_dim),
        ("k_norm", tensors.k_norm, kv_heads * dims.head_dim),
    ):
        if vector is None and size:
            raise KernelError(f"{name} must have {size} gains, got none.")
        if vector is not None:
            expect(name, tuple(vector.shape), (size,))
    if tensors.correction_bias is not None:
        expect("correction_bias", tuple(tensors.correction_bias.shape), (dims.num_experts,))
    if (tensors.router is None) != (tensors.experts is None):
        raise KernelError("a layer must have a router and experts, or neither.")
