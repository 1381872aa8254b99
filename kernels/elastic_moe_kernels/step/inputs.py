"""A batch that the C++ step has been handed: run it, then go on with it token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elastic_moe_kernels.constants import BLOCK_POSITIONS
from elastic_moe_kernels.errors import KernelError
from elastic_moe_kernels.step.checks import REFUSALS, Ints, check_arrays
from elastic_moe_kernels.step.outputs import Counters, StepResult

if TYPE_CHECKING:
    from elastic_moe_kernels.step.model import CpuModel

Answer = tuple[int, int, int, int, list[int], list[int], tuple[int, int, int, int, int, int]]


class BatchArrays(NamedTuple):
    """What a batch is made of, as `CpuModel.step` explains it."""

    token_ids: Ints
    positions: Ints
    sequences: Ints
    subnets: Ints
    block_tables: Ints
    logits_rows: Ints


class WantedOutputs(NamedTuple):
    """What a step gives beside the most likely tokens."""

    logits: bool
    states_after: Sequence[int]
    trace_slots: int  # 0: no trace


class PreparedStep:
    """Made by `CpuModel.prepare`. It keeps what the native step reads: its arrays, and through the
    native inputs the table, the rotary angles and the cache.

    Decoding is a long row of steps that differ in a token and a position per sequence: what they
    share is checked and handed over once.
    """

    def __init__(
        self,
        model: CpuModel,
        inputs: Any,
        arrays: BatchArrays,
        wanted: WantedOutputs,
    ) -> None:
        self._model, self._inputs, self._arrays = model, inputs, arrays
        self._wanted = wanted
        self._plain = wanted == (False, (), 0)
        self._logits = np.empty((0, model.dims.vocab_size), np.float32)
        self._states: NDArray[np.float32] | None = None
        self._topk_ids: NDArray[np.int32] | None = None

    def run(self) -> StepResult:
        """Run the batch as it was given."""
        self._allocate()
        try:
            answer = self._model.native.step(self._inputs, *self._arrays)
        except TypeError:
            check_arrays(self._model.dims, *self._arrays)
            raise
        return self._read(answer)

    def advance(self, token_ids: list[int]) -> StepResult:
        """Run the next token of every sequence; the batch must have one row of each.

        The block tables that `prepare` was given are read again: put new blocks into them.

        Args:
            token_ids: (T,) in the order of the rows.

        Raises:
            KernelError: as `CpuModel.step`; the batch then stays where it was.
        """
        if not self._plain:  # what earlier steps gave stays as it is
            self._allocate()
        try:
            answer = self._model.native.advance(self._inputs, token_ids)
        except TypeError:
            raise KernelError(
                f"token_ids must be a list of integers in [0, {self._model.dims.vocab_size - 1}], "
                f"got {token_ids!r:.80}."
            ) from None
        return self._read(answer)

    def _allocate(self) -> None:
        """Memory for the results of this step."""
        inputs, dims, wanted = self._inputs, self._model.dims, self._wanted
        rows = self._arrays.token_ids.size
        if wanted.logits:
            shape: tuple[int, ...] = (self._arrays.logits_rows.size, dims.vocab_size)
            self._logits = np.empty(shape, np.float32)
            inputs.set_logits(self._logits)
        if wanted.states_after:
            layers = np.zeros(dims.num_layers + 1, dtype=np.bool_)
            layers[list(wanted.states_after)] = True
            shape = (len(wanted.states_after), rows, dims.hidden_size)
            self._states = np.empty(shape, np.float32)
            inputs.set_states(layers, self._states)
        if wanted.trace_slots:
            shape = (dims.num_layers, rows, wanted.trace_slots)
            self._topk_ids = np.full(shape, -1, np.int32)
            inputs.set_trace(self._topk_ids)

    def _read(self, answer: Answer) -> StepResult:
        refusal, where, value, detail, best_ids, sequence_experts, counters = answer
        if refusal:
            self._refuse(refusal, where, value, detail)
        return StepResult(
            self._logits,
            self._states,
            self._topk_ids,
            Counters._make(counters),
            best_ids,
            sequence_experts,
        )

    def _refuse(self, refusal: int, where: int, value: int, detail: int) -> None:
        arrays, inputs = self._arrays, self._inputs
        check_arrays(self._model.dims, *arrays)
        sequences, _, blocks = arrays.block_tables.shape
        raise KernelError(
            REFUSALS[refusal].format(
                where=where,
                value=value,
                detail=detail,
                vocab=self._model.dims.vocab_size - 1,
                positions=min(inputs.angle_positions, BLOCK_POSITIONS * blocks) - 1,
                sequences=sequences - 1,
                subnets=inputs.subnet_count - 1,
                blocks=inputs.kv_blocks - 1,
                rows=arrays.token_ids.size - 1,
            )
        )
