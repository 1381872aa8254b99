"""The router: which experts run for every token, and their weights."""

from __future__ import annotations

import numpy as np

from elastic_moe_kernels import native
from elastic_moe_kernels.arrays import AnyArray, Array, array, device_of, dtype_name, like, tensor
from elastic_moe_kernels.constants import MAX_EXPERTS
from elastic_moe_kernels.errors import KernelError
from elastic_moe_kernels.ops.checks import check_array, check_number, no_backward
from elastic_moe_kernels.ops.dispatch import (
    Implementation,
    choose,
    load_reference,
    warn_if_degraded,
)
from elastic_moe_kernels.table import LayerTable


def route(
    router_logits: AnyArray,
    table: LayerTable,
    subnet_of_row: Array,
    *,
    renormalize: bool,
    epsilon: float = 0.0,
    correction_bias: Array | None = None,
    implementation: Implementation = "auto",
    threads: int | None = None,
) -> tuple[AnyArray, AnyArray]:
    """Choose the experts that run for every token, and their weights.

    Args:
        router_logits: (T, E) float32 before the softmax, contiguous; float64 on the reference.
        table: the choices of S sub-networks in this layer.
        subnet_of_row: (T,) int32 or int64 in [0, S), contiguous: the sub-network of every token.
        renormalize: divide each row of weights by max(its sum, epsilon).
        epsilon: the architecture's guard of that division, finite in float32 and >= 0.
        correction_bias: (E,) like router_logits, added to the scores for the selection only.
        implementation: "auto", "reference" or "cpu".
        threads: that take part at most; None for `default_threads`.

    Returns:
        topk_ids: (T, K) int32, K = table.max_top_k; kept experts first, highest score first, equal
            scores by lower index; -1 is padding.
        topk_weights: (T, K) like router_logits; 0 where topk_ids is -1.

    Raises:
        KernelError: an argument is outside what is said above, or the implementation cannot run.
    """
    if not isinstance(table, LayerTable):
        raise KernelError(f"table must be a LayerTable, got {type(table).__name__}.")
    device = device_of(table.pool)
    floats = ("float32", "float64")
    logits = check_array("router_logits", router_logits, floats, 2, device)
    subnet_of_row = check_array("subnet_of_row", subnet_of_row, ("int64", "int32"), 1, device)
    if correction_bias is not None:
        dtypes = (dtype_name(logits.dtype),)
        correction_bias = check_array("correction_bias", correction_bias, dtypes, 1, device)
    _check(logits, table, subnet_of_row, renormalize, epsilon, correction_bias)
    count = native.check_threads(threads)
    unfit = _unfit_for_cpu(logits, correction_bias)
    if implementation == "auto" and not unfit:
        warn_if_degraded()
    if choose(implementation, unfit) == "cpu":
        return route_native(
            router_logits,
            table,
            subnet_of_row,
            renormalize=renormalize,
            epsilon=epsilon,
            correction_bias=correction_bias,
            threads=count,
        )
    _check_values(table, subnet_of_row, correction_bias)
    ids, weights = load_reference().route(
        tensor(logits),
        table,
        tensor(subnet_of_row),
        renormalize=renormalize,
        epsilon=epsilon,
        correction_bias=None if correction_bias is None else tensor(correction_bias),
    )
    return like(router_logits, ids), like(router_logits, weights)


def route_native(
    router_logits: AnyArray,
    table: LayerTable,
    subnet_of_row: Array,
    *,
    renormalize: bool,
    epsilon: float = 0.0,
    correction_bias: Array | None = None,
    level: str | None = None,
    threads: int | None = None,
) -> tuple[AnyArray, AnyArray]:
    """The C++ kernel of `route`, on float32 arrays of the CPU whose dtypes and shapes were checked.

    Args:
        level: the instruction-set level to run; None for `level()`.

    A row whose logits inside its pool hold NaN or +inf, or are all -inf, gets the lowest
    min_experts experts of its pool with NaN weights, as in the reference. Scores below 1.2e-38 of
    the best are 0. A row's bits depend on nothing but its logits, its entry of the table and K.

    Raises:
        KernelError: a row names no sub-network of the table, the bias is not finite, or the level
            is not there.
    """
    logits = array(router_logits)
    shape = len(logits), table.max_top_k
    topk_ids = np.empty(shape, dtype=np.int32)
    topk_weights = np.empty(shape, dtype=np.float32)
    refusal, where, value = native.extension().route(
        native.level_index(level),
        router_logits=logits,
        subnet_of_row=array(subnet_of_row),
        top_k=table.top_k,
        min_experts=table.min_experts,
        threshold=table.threshold,
        pool=table.pool,
        correction_bias=None if correction_bias is None else array(correction_bias),
        renormalize=renormalize,
        epsilon=epsilon,
        topk_ids=topk_ids,
        topk_weights=topk_weights,
        threads=native.check_threads(threads),
    )
    if refusal:
        raise KernelError(_REFUSALS[refusal].format(where, value, table.num_subnets - 1))
    return like(router_logits, topk_ids), like(router_logits, topk_weights)


_REFUSALS = {
    1: "subnet_of_row[{0}] must be in [0, {2}], got {1:.0f}.",
    2: "row {0}: its sub-network has top_k {1:.0f} here, so nothing to route in this layer. "
    "Route only the rows whose sub-network runs this layer.",
    3: "correction_bias[{0}] must be finite, got {1}.",
}


def _check(
    router_logits: Array,
    table: LayerTable,
    subnet_of_row: Array,
    renormalize: bool,
    epsilon: float,
    correction_bias: Array | None,
) -> None:
    """Checks that read no values."""
    rows, experts = router_logits.shape
    if experts != table.num_experts:
        raise KernelError(
            f"router_logits must have {table.num_experts} columns, one per expert of the table, "
            f"got {experts}."
        )
    if subnet_of_row.shape[0] != rows:
        raise KernelError(
            f"subnet_of_row must have one entry for each of the {rows} rows of router_logits, "
            f"got {subnet_of_row.shape[0]}."
        )
    if correction_bias is not None and correction_bias.shape[0] != experts:
        raise KernelError(
            f"correction_bias must have one entry for each of the {experts} experts, "
            f"got {correction_bias.shape[0]}."
        )
    check_number("epsilon", epsilon, low=0)
    if not isinstance(renormalize, bool):
        raise KernelError(f"renormalize must be True or False, got {renormalize!r}.")


def _unfit_for_cpu(router_logits: Array, correction_bias: Array | None) -> str:
    """Why the C++ kernel cannot take these, as the end of a sentence; "" if it can."""
    device, dtype = device_of(router_logits), dtype_name(router_logits.dtype)
    if device != "cpu":
        return f"needs arrays on the CPU, got {device}. Move them."
    if dtype != "float32":
        return f"needs float32 router_logits, got {dtype}. Convert them."
    if router_logits.shape[1] > MAX_EXPERTS:
        return f"takes at most {MAX_EXPERTS} experts, got {router_logits.shape[1]}."
    return no_backward(router_logits, *([] if correction_bias is None else [correction_bias]))


def _check_values(table: LayerTable, subnet_of_row: Array, correction_bias: Array | None) -> None:
    """The checks that the C++ kernel makes in its own pass, for the reference.

    Not on other devices, where looking would stop the queue: an index out of range is reported by
    the device itself.
    """
    if device_of(subnet_of_row) != "cpu":
        return
    rows = array(subnet_of_row)
    if rows.size:
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or high >= table.num_subnets:
            at = int(((rows < 0) | (rows >= table.num_subnets)).argmax())
            raise KernelError(
                f"subnet_of_row[{at}] must be in [0, {table.num_subnets - 1}], got {rows[at]}."
            )
        idle = table.top_k < 1  # (S,)
        if idle.any() and idle[rows].any():
            at = int(idle[rows].argmax())
            raise KernelError(
                f"row {at}: its sub-network has top_k {int(table.top_k[rows[at]])} here, so "
                f"nothing to route in this layer. Route only the rows whose sub-network runs it."
            )
    if correction_bias is not None and not np.isfinite(array(correction_bias)).all():
        raise KernelError("correction_bias must be finite, got NaN or an infinity.")
