"""A whole model in C++: packed once, then one call per step runs all layers.

A step is a flat batch of tokens from many sequences, prefill chunks and single tokens mixed, each
with a sub-network of its own. The step is batch-invariant: a sequence's logits are bit for bit
those that it gets alone, whatever runs beside it, however its prompt is cut into chunks, and on
any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic_moe_kernels import native
from elastic_moe_kernels.arrays import AnyDType, Array, array, empty, to_dtype, value_dtype
from elastic_moe_kernels.columns import SUBNET_COLUMNS, SubnetColumns
from elastic_moe_kernels.errors import KernelError
from elastic_moe_kernels.kv_blocks import block_bytes, check_blocks
from elastic_moe_kernels.ops.linear import linear_native
from elastic_moe_kernels.ops.norm import rms_norm_native
from elastic_moe_kernels.packing import (
    Arena,
    PackedExperts,
    PackedMatrix,
    pack_experts,
    pack_matrix,
)
from elastic_moe_kernels.step.checks import (
    Ints,
    check_layer,
    check_states,
    check_table,
    expect,
)
from elastic_moe_kernels.step.inputs import BatchArrays, PreparedStep, WantedOutputs
from elastic_moe_kernels.step.outputs import StepResult
from elastic_moe_kernels.step.weights import LayerTensors, ModelDims, check_dims
from elastic_moe_kernels.table import GrowingTable


class CpuModel:
    """Packed weights and their step.

    Calls of `step` must not overlap; a second one at the same time raises `KernelError`.

    Args:
        dims: sizes.
        dtype: of matrices, their inputs, keys and values.
        level: instruction-set level; None for `native.level()`.

    Attributes:
        threads: that take part in a call, at most.

    Raises:
        KernelError: sizes that the kernels do not take, or the C++ kernels are missing.
    """

    def __init__(self, dims: ModelDims, dtype: AnyDType, level: str | None = None) -> None:
        check_dims(dims)
        extension = native.extension()
        self.dims, self.dtype = dims, value_dtype(dtype, "matrices")
        self.threads = native.check_threads(None)
        self.level = level or native.level()
        self.native = extension.Model(
            native.level_index(self.level), bf16=self.dtype == "bfloat16", **asdict(dims)
        )
        self._arena: Arena | None = None
        # `native` may be exchanged for a stand-in that times steps; batches are prepared here.
        self._native_prepare = self.native.prepare
        # By layer: q k v, out, router, experts, and what every token runs.
        self._packed: dict[int, tuple[PackedMatrix | PackedExperts | None, ...]] = {}
        self._ends: tuple[NDArray[np.float32], PackedMatrix] | None = None  # final norm and head
        self._angles: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
        self._native_angles: Any = None
        self._last_table: tuple[SubnetColumns, Any] | None = None
        self._routing_layers: set[int] = set()

    # Weights

    def reserve(self, size_bytes: int) -> None:
        """Allocate huge pages for all packed weights; `packed_bytes` gives the size."""
        self._arena = Arena(size_bytes)
        self._arena.populate()

    def set_layer(self, index: int, tensors: LayerTensors) -> None:
        """Pack one layer; the tensors given may be dropped afterwards."""
        dims = self.dims
        check_layer(dims, tensors)
        qkv = self._matrix([tensors.q, tensors.k, tensors.v])
        out = self._matrix(tensors.out)
        expect("q, k and v", (qkv.outputs, qkv.inputs), (dims.qkv_size, dims.hidden_size))
        expect("out", (out.outputs, out.inputs), (dims.hidden_size, dims.query_size))
        router = None
        if tensors.router is not None:
            router = pack_matrix(tensors.router, dtype="float32", arena=self._arena)
            expect("router", (router.outputs, router.inputs), (dims.num_experts, dims.hidden_size))
        experts = everyone = None
        if tensors.experts is not None:
            experts = pack_experts(
                tensors.experts,
                dims.num_experts,
                dims.hidden_size,
                dims.expert_hidden,
                dtype=self.dtype,
                arena=self._arena,
            )
        if tensors.everyone is not None:
            channels = len(tensors.everyone[0])
            everyone = pack_experts(
                [tensors.everyone],
                1,
                dims.hidden_size,
                channels,
                dtype=self.dtype,
                arena=self._arena,
            )
        vectors = [
            None if v is None else _floats(v)
            for v in (
                tensors.attention_norm,
                tensors.q_norm,
                tensors.k_norm,
                tensors.mlp_norm,
                tensors.correction_bias,
            )
        ]
        attention_norm, q_norm, k_norm, mlp_norm, bias = vectors
        if router is not None:
            self._routing_layers.add(index)
        self._packed[index] = (qkv, out, router, experts, everyone)
        self.native.set_layer(
            index,
            attention_norm=attention_norm,
            q_norm=q_norm,
            k_norm=k_norm,
            qkv=qkv.data,
            out=out.data,
            mlp_norm=mlp_norm,
            router=None if router is None else router.data,
            correction_bias=bias,
            experts=None if experts is None else experts.data,
            everyone=None if everyone is None else everyone.data,
            everyone_channels=0 if everyone is None else everyone.channels,
        )

    def set_ends(self, embeddings: Array, final_norm: Array, head: Array) -> None:
        """Embeddings (V, D), the final norm (D,), and the head (V, D), which is packed."""
        rows = np.ascontiguousarray(to_dtype(array(embeddings), self.dtype))
        gain = _floats(final_norm)
        packed = self._matrix(head)
        shape = (self.dims.vocab_size, self.dims.hidden_size)
        expect("final_norm", tuple(gain.shape), shape[1:])
        expect("embeddings", tuple(rows.shape), shape)
        expect("head", (packed.outputs, packed.inputs), shape)
        self._ends = gain, packed
        self.native.set_ends(embeddings=rows, final_norm=gain, head=packed.data)

    def _matrix(self, parts: Array | Sequence[Array]) -> PackedMatrix:
        return pack_matrix(parts, dtype=self.dtype, arena=self._arena)

    def set_angles(self, cos: Array, sin: Array) -> None:
        """Cosines and sines of the rotary angles, (positions, d/2) float32."""
        shape = (len(cos), self.dims.head_dim // 2)
        expect("cos", tuple(cos.shape), shape)
        expect("sin", tuple(sin.shape), shape)
        self._angles = _floats(cos), _floats(sin)
        self._native_angles = native.extension().Angles(cos=self._angles[0], sin=self._angles[1])

    # Cache

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of keys and values: 16 positions of one layer."""
        return block_bytes(self.dims.num_kv_heads, self.dims.head_dim, self.dtype)

    def new_blocks(self, count: int) -> NDArray[np.uint8]:
        """`count` blocks of keys and values, not initialised: (count, block_bytes) uint8."""
        return empty((count, self.block_bytes), np.uint8)

    # Running

    def new_table(self, channels_per_granule: int) -> GrowingTable:
        """An empty table, whose `columns` `prepare` takes: rows are checked when they are added."""
        dims = self.dims
        check = partial(check_table, dims, routing_layers=sorted(self._routing_layers))
        return GrowingTable(dims.num_layers, dims.num_experts, channels_per_granule, check)

    def step(
        self,
        token_ids: Ints,
        positions: Ints,
        sequences: Ints,
        subnets: Ints,
        table: SubnetColumns,
        blocks: Array,
        block_tables: Ints,
        logits_rows: Ints,
        *,
        states_after: Sequence[int] = (),
        trace: bool = False,
        threads: int | None = None,
    ) -> StepResult:
        """Run T tokens through the layers of their sub-networks.

        Args:
            token_ids, positions: (T,).
            sequences: (T,) which row of `block_tables`; the tokens of a sequence are consecutive
                rows at consecutive positions, and all earlier positions are in the cache.
            subnets: (T,) which entry of `table`; within a sequence the same layers run.
            table: the sub-networks.
            blocks: from `new_blocks`.
            block_tables: (S, L, B): block i of a row holds positions 16i..16i+15 of one sequence in
                one layer; entries of layers that do not run are not read.
            logits_rows: (n,) rows to give logits of.
            states_after: ascending layer counts in [0, L] after which to copy the stream.
            trace: whether to return which experts ran.
            threads: that take part, at most; None for `threads` of the model.

        Raises:
            KernelError: an argument is outside what is said above, or another step is running;
                nothing was computed.
        """
        arrays = BatchArrays(token_ids, positions, sequences, subnets, block_tables, logits_rows)
        prepared = self.prepare(
            arrays, table, blocks, states_after=states_after, trace=trace, threads=threads
        )
        return prepared.run()

    def prepare(
        self,
        arrays: BatchArrays,
        table: SubnetColumns,
        blocks: Array,
        *,
        logits: bool = True,
        states_after: Sequence[int] = (),
        trace: bool = False,
        threads: int | None = None,
    ) -> PreparedStep:
        """Look at a batch that is to be run, and perhaps gone on with; arguments as of `step`.

        Args:
            logits: whether logits are wanted, or only the most likely tokens.
        """
        dims = self.dims
        if self._angles is None:
            raise KernelError("no rotary angles are set. Call set_angles first.")
        memory = array(blocks)
        check_blocks(memory, self.block_bytes)
        inputs = self._native_prepare(
            table=self._columns_of(table),
            angles=self._native_angles,
            blocks=memory,
            threads=native.check_threads(self.threads if threads is None else threads),
        )
        slots = int(np.where(table.active, table.top_k, 0).max()) if trace else 0
        wanted = WantedOutputs(logits, tuple(check_states(states_after, dims.num_layers)), slots)
        return PreparedStep(self, inputs, arrays, wanted)

    def logits(self, states: Array) -> NDArray[np.float32]:
        """Final norm and head: residual stream (n, D) float32 -> logits (n, V) float32.

        The bits are those that `step` gives for the same stream.
        """
        final_states = self.final_states(states)
        _, head = self._known_ends()
        return linear_native(final_states, head, level=self.level, threads=self.threads)

    def final_states(self, states: Array) -> NDArray[np.float32]:
        """Final norm: residual stream (n, D) -> (n, D) float32."""
        dims = self.dims
        expect("states", tuple(states.shape), (len(states), dims.hidden_size))
        x = np.ascontiguousarray(to_dtype(array(states), "float32"))
        gain, _ = self._known_ends()
        return rms_norm_native(x, gain, dims.rms_norm_eps, level=self.level, threads=self.threads)

    def _known_ends(self) -> tuple[NDArray[np.float32], PackedMatrix]:
        if self._ends is None:
            raise KernelError("weights are missing: ends. Call set_ends.")
        return self._ends

    def _columns_of(self, table: SubnetColumns) -> Any:
        """The columns that the native step reads. A table is checked once, and remembered."""
        if self._last_table is not None and self._last_table[0] is table:
            return self._last_table[1]
        missing: set[object] = {*range(self.dims.num_layers)} - self._packed.keys()
        if self._ends is None:
            missing.add("ends")
        if missing:
            raise KernelError(
                f"weights are missing: {', '.join(sorted(map(str, missing)))}. "
                f"Call set_layer for every layer, and set_ends."
            )
        check_table(self.dims, table, sorted(self._routing_layers))
        columns = native.extension().SubnetColumns(
            **{name: np.ascontiguousarray(getattr(table, name)) for name in SUBNET_COLUMNS}
        )
        self._last_table = table, columns
        return columns


def _floats(values: Array) -> NDArray[np.float32]:
    """A copy in float32, row-major, that nobody else writes to."""
    return np.array(to_dtype(array(values), "float32"), dtype=np.float32, order="C")
