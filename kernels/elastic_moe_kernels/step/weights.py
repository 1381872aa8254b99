"""What a model is to the C++ step: its sizes, and its weights layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from elastic_moe_kernels.arrays import AnyDType, Array
from elastic_moe_kernels.constants import (
    MAX_EXPERTS,
    MAX_HEAD_DIM,
    MAX_HEADS_PER_GROUP,
    STEP_BYTES,
)
from elastic_moe_kernels.errors import KernelError
from elastic_moe_kernels.ops.checks import check_number
from elastic_moe_kernels.packing import expert_bytes, matrix_bytes


@dataclass(frozen=True, slots=True)
class ModelDims:
    """The sizes and habits of a model; names as in its config.json.

    Attributes:
        num_experts, expert_hidden: of the layers that route.
        qk_norm: norms on queries and keys: one gain per channel of a head, or of all heads.
        rope: which channels rotate together: i with i + d/2, or 2i with 2i + 1.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    expert_hidden: int
    rms_norm_eps: float
    qk_norm: Literal["none", "head", "all"] = "none"
    rope: Literal["half", "interleaved"] = "half"
    renormalize: bool = True
    routing_epsilon: float = 0.0

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


# Gate and up (F, D) and down (D, F) of each expert in turn.
Experts = Iterable[tuple[Array, Array, Array]]


@dataclass(frozen=True, slots=True, eq=False)
class LayerTensors:
    """One layer's weights as a checkpoint has them, arrays of any kind; matrices (outputs, inputs).

    Attributes:
        router, correction_bias, experts: None in a dense layer. Experts may come one by one, so
            that a checkpoint need not be in memory beside what is packed of it.
        everyone: what every token runs, as one expert: shared experts, or the dense MLP.
    """

    attention_norm: Array
    q: Array
    k: Array
    v: Array
    out: Array
    mlp_norm: Array
    q_norm: Array | None = None
    k_norm: Array | None = None
    router: Array | None = None
    correction_bias: Array | None = None
    experts: Experts | None = None
    everyone: tuple[Array, Array, Array] | None = None


def packed_bytes(dims: ModelDims, dtype: AnyDType, layers: Sequence[tuple[bool, int]]) -> int:
    """Bytes that the packed weights take.

    Args:
        layers: for each, whether it routes, and the hidden channels that every token runs.
    """

    def up(size: int) -> int:
        return -(-size // STEP_BYTES) * STEP_BYTES

    total = up(matrix_bytes(dims.vocab_size, dims.hidden_size, dtype))
    for routes, everyone in layers:
        total += up(matrix_bytes(dims.qkv_size, dims.hidden_size, dtype))
        total += up(matrix_bytes(dims.hidden_size, dims.query_size, dtype))
        if routes:
            total += up(matrix_bytes(dims.num_experts, dims.hidden_size, "float32"))
            total += dims.num_experts * expert_bytes(dims.hidden_size, dims.expert_hidden, dtype)
        if everyone:
            total += expert_bytes(dims.hidden_size, everyone, dtype)
    return total


def check_dims(dims: ModelDims) -> None:
    """Raise `KernelError` for sizes and numbers that the kernels do not take."""
    if dims.head_dim % 2 or not 2 <= dims.head_dim <= MAX_HEAD_DIM:
        raise KernelError(f"head_dim must be even and in [2, {MAX_HEAD_DIM}], got {dims.head_dim}.")
    group = dims.num_heads / dims.num_kv_heads
    if group != int(group) or group > MAX_HEADS_PER_GROUP:
        raise KernelError(
            f"num_heads must be 1 to {MAX_HEADS_PER_GROUP} times num_kv_heads, got "
            f"{dims.num_heads} and {dims.num_kv_heads}."
        )
    if dims.num_experts > MAX_EXPERTS:
        raise KernelError(f"num_experts must be at most {MAX_EXPERTS}, got {dims.num_experts}.")
    check_number("rms_norm_eps", dims.rms_norm_eps, low=0)
    check_number("routing_epsilon", dims.routing_epsilon, low=0)
