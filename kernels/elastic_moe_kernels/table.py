"""Tables of sub-networks: which layers, experts and channels each row of a batch may use.

A batch mixes sequences that run different sub-networks. Kernels see S distinct sub-networks as
arrays indexed [subnet][layer], and one subnet index per row (token).

`LayerTable` and `SubnetTable` are checked once, when they are made; kernels rely on that, so their
arrays must not be written to afterwards. `GrowingTable` is for a model that serves requests: a
sub-network's row is checked and written when its first user comes, and reused after its last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic_moe_kernels.arrays import Array, array, device_of, tensor
from elastic_moe_kernels.columns import (
    LAYER_COLUMNS,
    SUBNET_COLUMNS,
    Column,
    LayerChoice,
    LayerColumns,
    SubnetColumns,
    check_arrays,
    check_values,
)

FIRST_ROWS = 16  # of a `GrowingTable`


# No generated equality: comparing arrays gives arrays.
@dataclass(frozen=True, slots=True, eq=False)
class LayerTable(LayerColumns):
    """What each of S sub-networks may use in one layer.

    Attributes:
        top_k: (S,) int32, experts per token, in [1, E].
        min_experts: (S,) int32, experts that no threshold drops, in [1, top_k].
        threshold: (S,) float32 in [0, 1].
        channels: (S,) int32, hidden channels of each expert that run, in [1, F].
        pool: (S, E) bool, experts that may be chosen; at least top_k of them.
        max_top_k: K, the largest top_k: how many slots a row of routing results has.

    Raises:
        KernelError: the kind, dtype, shape or device of an array is wrong, or a value out of range.
    """

    max_top_k: int = field(init=False)

    def __post_init__(self) -> None:
        _take(self, LAYER_COLUMNS, "S")
        check_values(self, None)
        object.__setattr__(self, "max_top_k", int(self.top_k.max()) if self.num_subnets else 0)

    @property
    def num_subnets(self) -> int:
        return int(self.pool.shape[0])

    @property
    def num_experts(self) -> int:
        return int(self.pool.shape[1])

    @classmethod
    def _checked(cls, columns: Sequence[Array], max_top_k: int) -> LayerTable:
        """A layer of a `SubnetTable`, which was checked as a whole."""
        table = object.__new__(cls)
        for name, values in zip(LAYER_COLUMNS, columns, strict=True):
            object.__setattr__(table, name, values)
        object.__setattr__(table, "max_top_k", max_top_k)
        return table


@dataclass(frozen=True, slots=True, eq=False)
class SubnetTable(SubnetColumns):
    """S sub-networks of a model with L layers and E experts: `LayerTable` with shapes (S, L, ...).

    `active` is (S, L) bool; the other entries of an inactive layer are never read, and top_k is 0
    in an active layer that routes nothing.
    """

    _layers: tuple[LayerTable, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _take(self, SUBNET_COLUMNS, "S, L")
        routed = _routed(self)
        check_values(self, routed)
        slots = np.where(routed, self.top_k, 0)  # (S, L)
        self._set_layers(slots.max(axis=0).tolist() if len(slots) else [0] * slots.shape[1])

    def _set_layers(self, max_top_k: list[int]) -> None:
        # All layers at once: a decode step asks for every one of them.
        columns = (getattr(self, name).swapaxes(0, 1) for name in LAYER_COLUMNS)
        rows = zip(*columns, strict=True)
        layers = tuple(map(LayerTable._checked, rows, max_top_k))
        object.__setattr__(self, "_layers", layers)

    def layer(self, index: int) -> LayerTable:
        """The table of one layer."""
        return self._layers[index]

    def to(self, device: Any) -> SubnetTable:
        """This table as torch tensors on a device; itself if it is there already."""
        if str(device) == device_of(self.active):
            return self
        table = object.__new__(SubnetTable)
        for name in SUBNET_COLUMNS:
            object.__setattr__(table, name, tensor(getattr(self, name), device))
        table._set_layers([layer.max_top_k for layer in self._layers])
        return table


def _take(table: LayerColumns, columns: Mapping[str, Column], dims: str) -> None:
    """Check the arrays that a table was made from, and keep them as numpy sees them."""
    check_arrays(table, columns, dims)
    for name in columns:
        object.__setattr__(table, name, array(getattr(table, name)))


def build_table(
    subnets: Sequence[Sequence[LayerChoice]], num_experts: int, channels_per_granule: int
) -> SubnetTable:
    """The table of S >= 1 sub-networks, each a choice for every layer of one model.

    Args:
        channels_per_granule: hidden channels of an expert that one granule of width has.
    """
    return SubnetTable(**_arrays(subnets, num_experts, channels_per_granule))


def _routed(columns: SubnetColumns) -> Array:
    """(S, L) bool: where the entries other than `active` are read."""
    return columns.active & (columns.top_k != 0)


def _arrays(
    subnets: Sequence[Sequence[LayerChoice]], num_experts: int, channels_per_granule: int
) -> dict[str, NDArray[Any]]:
    """The columns of S >= 1 sub-networks by name, not checked."""

    def column_of(column: Column) -> NDArray[Any]:
        value = column.value
        values = [[value(layer, channels_per_granule) for layer in layers] for layers in subnets]
        if not column.per_expert:
            return np.array(values, dtype=column.dtype)
        chosen = np.zeros((len(subnets), len(subnets[0]), num_experts), dtype=column.dtype)
        for of_subnet, row in zip(values, chosen, strict=True):
            for ids, layer in zip(of_subnet, row, strict=True):
                layer[list(ids)] = True
        return chosen

    return {name: column_of(column) for name, column in SUBNET_COLUMNS.items()}


class GrowingTable:
    """A row for every sub-network that has users, in columns that grow when all rows are taken.

    One thread adds users and runs kernels; any thread may remove users. A row keeps its number
    while it has users. Afterwards it waits to be found again, until a new sub-network needs a row:
    of those without users, the one that was so for longest is taken.

    Args:
        num_layers, num_experts, channels_per_granule: of the model.
        check: raises for a sub-network that the model cannot run; called with its columns, (1, L).

    Attributes:
        columns: what kernels read; another object after growth. Rows without users are named by no
            batch, and hold what their last user left.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        channels_per_granule: int,
        check: Callable[[SubnetColumns], None],
    ) -> None:
        self._num_experts, self._channels_per_granule = num_experts, channels_per_granule
        self._check = check
        self._row_of: dict[Hashable, int] = {}
        self._key_of: list[Hashable] = []  # None: never used
        self._users: list[int] = []
        self._unused: dict[int, None] = {}  # in the order in which they lost their users
        self._removed: deque[int] = deque()  # by other threads, to be counted by the one that adds
        shape = (0, num_layers)
        self.columns = SubnetColumns(
            **{
                name: np.zeros(
                    (*shape, num_experts) if column.per_expert else shape, dtype=column.dtype
                )
                for name, column in SUBNET_COLUMNS.items()
            }
        )

    def __len__(self) -> int:
        """Rows that have users."""
        self._count_removed()
        return len(self._users) - len(self._unused)

    def add(self, key: Hashable, layers: Sequence[LayerChoice]) -> int:
        """Count one more user of a sub-network; the number of its row.

        Args:
            key: equal for equal sub-networks alone.

        Raises:
            KernelError: the model cannot run it; nothing was added.
        """
        self._count_removed()
        row = self._row_of.get(key)
        if row is None:
            new = _arrays([layers], self._num_experts, self._channels_per_granule)
            columns = SubnetColumns(**new)  # of this row alone
            check_values(columns, _routed(columns))
            self._check(columns)
            if not self._unused:
                self._grow()
            row = next(iter(self._unused))
            self._row_of.pop(self._key_of[row], None)
            for name, values in new.items():
                getattr(self.columns, name)[row] = values[0]
            self._row_of[key] = row
            self._key_of[row] = key
        self._unused.pop(row, None)
        self._users[row] += 1
        return row

    def remove(self, row: int) -> None:
        """Take one user of a row away; from any thread, and also while an object is finalised."""
        self._removed.append(row)

    def _count_removed(self) -> None:
        while self._removed:
            row = self._removed.popleft()
            self._users[row] -= 1
            if not self._users[row]:
                self._unused[row] = None

    def _grow(self) -> None:
        """Twice the rows, in new arrays: a step that was prepared keeps the old ones."""
        old = len(self._users)
        more = max(old, FIRST_ROWS)
        columns = {name: getattr(self.columns, name) for name in SUBNET_COLUMNS}
        self.columns = SubnetColumns(
            **{
                name: np.concatenate([column, np.zeros((more, *column.shape[1:]), column.dtype)])
                for name, column in columns.items()
            }
        )
        self._users += [0] * more
        self._key_of += [None] * more
        self._unused |= dict.fromkeys(range(old, old + more))
