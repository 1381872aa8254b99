"""The columns of a table of sub-networks, each declared once: dtype, value, range.

A column is a field of `LayerColumns`, or of `SubnetColumns` if it says whether a layer runs at all.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import numpy as np

from elastic_moe_kernels.arrays import Array, array, device_of, dtype_name, is_array
from elastic_moe_kernels.errors import KernelError


class LayerChoice(Protocol):
    """What a sub-network uses of one layer; without `active`, the rest means nothing.

    Attributes:
        top_k: experts per token; 0 in a layer that routes nothing.
        min_experts: experts that no threshold drops.
        expert_width: granules of hidden channels of each expert.
        sparsity_threshold: in [0, 1].
        expert_pool: ids of the experts that may be chosen.
    """

    @property
    def active(self) -> bool: ...
    @property
    def top_k(self) -> int: ...
    @property
    def min_experts(self) -> int: ...
    @property
    def expert_width(self) -> int: ...
    @property
    def sparsity_threshold(self) -> float: ...
    @property
    def expert_pool(self) -> Sequence[int]: ...


@dataclass(frozen=True, slots=True)
class Range:
    """The values that a column may have.

    Attributes:
        fits: True where an entry is in range; written so that NaN is not.
        allowed: the range of the entry at an index, in words.
    """

    fits: Callable[[LayerColumns], Array]
    allowed: Callable[[LayerColumns, tuple[int, ...]], str]


@dataclass(frozen=True, slots=True)
class Column:
    """How a column of a table is made and checked.

    Attributes:
        value: of a layer's choice, given the hidden channels that one granule of width has; ids of
            experts if `per_expert`.
        range: of the entries that count; None: any value.
        per_expert: whether it has one entry for each expert.
    """

    dtype: type[np.generic]
    value: Callable[[LayerChoice, int], Any]
    range: Range | None = None
    per_expert: bool = False


# No generated equality: comparing arrays gives arrays.
@dataclass(frozen=True, slots=True, eq=False)
class LayerColumns:
    """The arrays of a `LayerTable`, in its shapes: numpy's, or torch's on another device."""

    top_k: Array = field(
        metadata={
            "column": Column(
                np.int32,
                value=lambda choice, _: choice.top_k,
                range=Range(
                    lambda c: (c.top_k >= 1) & (c.top_k <= c.pool.sum(-1)),
                    lambda c, at: f"in [1, {int(c.pool[at].sum())}], the size of its pool",
                ),
            )
        }
    )
    min_experts: Array = field(
        metadata={
            "column": Column(
                np.int32,
                value=lambda choice, _: choice.min_experts,
                range=Range(
                    lambda c: (c.min_experts >= 1) & (c.min_experts <= c.top_k),
                    lambda c, at: f"in [1, {int(c.top_k[at])}], its top_k",
                ),
            )
        }
    )
    threshold: Array = field(
        metadata={
            "column": Column(
                np.float32,
                value=lambda choice, _: choice.sparsity_threshold,
                range=Range(
                    lambda c: (c.threshold >= 0) & (c.threshold <= 1),
                    lambda *_: "a number in [0, 1]",
                ),
            )
        }
    )
    channels: Array = field(
        metadata={
            "column": Column(
                np.int32,
                value=lambda choice, per_granule: choice.expert_width * per_granule,
                range=Range(lambda c: c.channels >= 1, lambda *_: "at least 1"),
            )
        }
    )
    pool: Array = field(
        metadata={
            "column": Column(np.bool_, value=lambda choice, _: choice.expert_pool, per_expert=True)
        }
    )


@dataclass(frozen=True, slots=True, eq=False)
class SubnetColumns(LayerColumns):
    """The arrays of a `SubnetTable`, in its shapes."""

    active: Array = field(
        metadata={"column": Column(np.bool_, value=lambda choice, _: choice.active)}
    )


def _columns(table: type[LayerColumns]) -> dict[str, Column]:
    return {f.name: f.metadata["column"] for f in fields(table) if "column" in f.metadata}


LAYER_COLUMNS, SUBNET_COLUMNS = _columns(LayerColumns), _columns(SubnetColumns)


def check_arrays(table: LayerColumns, columns: Mapping[str, Column], dims: str) -> None:
    """Kinds, dtypes, shapes and devices: nothing that reads values."""
    arrays = {name: getattr(table, name) for name in columns}
    for name, values in arrays.items():
        if not is_array(values):
            raise KernelError(
                f"{name} must be a numpy or torch array, got {type(values).__name__}."
            )
    pool = table.pool
    for name, values in arrays.items():
        column = columns[name]
        wanted, got = dtype_name(column.dtype), dtype_name(values.dtype)
        if got != wanted:
            raise KernelError(f"{name} must be {wanted}, got {got}. Convert it.")
        shape = pool.shape if column.per_expert else pool.shape[:-1]
        if values.shape != shape or pool.ndim != dims.count(",") + 2:
            raise KernelError(
                f"{name} must have shape ({dims}{', E' if column.per_expert else ''}) with "
                f"({dims}, E) the shape of pool, {tuple(pool.shape)}, got {tuple(values.shape)}."
            )
        if device_of(values) != device_of(pool):
            raise KernelError(
                f"{name} is on {device_of(values)} and pool on {device_of(pool)}. "
                f"Move all arrays of a table to one device."
            )
    if pool.shape[-1] < 1:
        raise KernelError("pool must have at least one expert per row, got 0.")


def check_values(table: LayerColumns, used: Array | None) -> None:
    """Ranges of the entries where `used`; one combined test, taken apart only if it fails."""
    ranges = {name: column.range for name, column in SUBNET_COLUMNS.items() if column.range}
    fine = {name: each.fits(table) for name, each in ranges.items()}
    good = functools.reduce(operator.and_, fine.values())
    if bool((good if used is None else good | ~used).all()):
        return
    for name, ok in fine.items():
        bad = array(~ok if used is None else ~ok & used)
        if not bad.any():
            continue
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        allowed = ranges[name].allowed(table, at)
        where = f"sub-network {at[0]}" + (f", layer {at[1]}" if len(at) > 1 else "")
        raise KernelError(
            f"{where}: {name} must be {allowed}, got {getattr(table, name)[at].item()}."
        )
