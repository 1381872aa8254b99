"""Tables of sub-networks: which layers, experts and channels each row of a batch may use.

A batch mixes sequences that run different sub-networks. Kernels see S distinct sub-networks as
arrays indexed [subnet][layer], and one subnet index per row (token).

`LayerTable` and `SubnetTable` are checked once, when they are made; kernels rely on that, so their
tensors must not be written to afterwards. `GrowingTable` is for a model that serves requests: a
sub-network's row is checked and written when its first user comes, and reused after its last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from elastic_moe_kernels.errors import KernelError

_DTYPES = {
    "active": torch.bool,
    "top_k": torch.int32,
    "min_experts": torch.int32,
    "threshold": torch.float32,
    "channels": torch.int32,
    "pool": torch.bool,
}
FIRST_ROWS = 16  # of a `GrowingTable`


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


# No generated equality: comparing tensors gives tensors.
@dataclass(frozen=True, slots=True, eq=False)
class LayerTable:
    """What each of S sub-networks may use in one layer.

    Attributes:
        top_k: (S,) int32, experts per token, in [1, E].
        min_experts: (S,) int32, experts that no threshold drops, in [1, top_k].
        threshold: (S,) float32 in [0, 1].
        channels: (S,) int32, hidden channels of each expert that run, in [1, F].
        pool: (S, E) bool, experts that may be chosen; at least top_k of them.
        max_top_k: K, the largest top_k: how many slots a row of routing results has.

    Raises:
        KernelError: a tensor has the wrong dtype, shape or device, or a value is out of range.
    """

    top_k: Tensor
    min_experts: Tensor
    threshold: Tensor
    channels: Tensor
    pool: Tensor
    max_top_k: int = field(init=False)

    def __post_init__(self) -> None:
        _check_tensors({name: getattr(self, name) for name in _DTYPES if name != "active"}, "S")
        _check_values(self.top_k, self.min_experts, self.threshold, self.channels, self.pool, None)
        object.__setattr__(self, "max_top_k", int(self.top_k.max()) if self.num_subnets else 0)

    @property
    def num_subnets(self) -> int:
        return self.pool.shape[0]

    @property
    def num_experts(self) -> int:
        return self.pool.shape[1]

    @classmethod
    def _checked(
        cls,
        top_k: Tensor,
        min_experts: Tensor,
        threshold: Tensor,
        channels: Tensor,
        pool: Tensor,
        max_top_k: int,
    ) -> LayerTable:
        """A layer of a `SubnetTable`, which was checked as a whole."""
        table = object.__new__(cls)
        object.__setattr__(table, "top_k", top_k)
        object.__setattr__(table, "min_experts", min_experts)
        object.__setattr__(table, "threshold", threshold)
        object.__setattr__(table, "channels", channels)
        object.__setattr__(table, "pool", pool)
        object.__setattr__(table, "max_top_k", max_top_k)
        return table


@dataclass(frozen=True, slots=True, eq=False)
class SubnetTable:
    """S sub-networks of a model with L layers and E experts: `LayerTable` with shapes (S, L, ...).

    `active` is (S, L) bool; the other entries of an inactive layer are never read, and top_k is 0
    in an active layer that routes nothing.
    """

    active: Tensor
    top_k: Tensor
    min_experts: Tensor
    threshold: Tensor
    channels: Tensor
    pool: Tensor
    _layers: tuple[LayerTable, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_tensors({name: getattr(self, name) for name in _DTYPES}, "S, L")
        routed = self.active & (self.top_k != 0)
        _check_values(
            self.top_k, self.min_experts, self.threshold, self.channels, self.pool, routed
        )
        slots = torch.where(routed, self.top_k, 0)  # (S, L)
        max_top_k = slots.amax(dim=0).tolist() if len(slots) else [0] * slots.shape[1]
        self._set_layers(max_top_k)

    def _set_layers(self, max_top_k: list[int]) -> None:
        # All layers at once, each contiguous: a decode step asks for every one of them.
        fields = (self.top_k, self.min_experts, self.threshold, self.channels, self.pool)
        columns = [tensor.transpose(0, 1).contiguous().unbind(0) for tensor in fields]
        layers = tuple(
            LayerTable._checked(*tensors) for tensors in zip(*columns, max_top_k, strict=True)
        )
        object.__setattr__(self, "_layers", layers)

    def layer(self, index: int) -> LayerTable:
        """The table of one layer."""
        return self._layers[index]

    def to(self, device: torch.device | str) -> SubnetTable:
        """This table on `device`; itself if it is there already."""
        if self.active.device == torch.device(device):
            return self
        table = object.__new__(SubnetTable)
        for name in _DTYPES:
            object.__setattr__(table, name, getattr(self, name).to(device))
        table._set_layers([layer.max_top_k for layer in self._layers])
        return table


def build_table(
    subnets: Sequence[Sequence[LayerChoice]], num_experts: int, channels_per_granule: int
) -> SubnetTable:
    """The table of S >= 1 sub-networks, each a choice for every layer of one model.

    Args:
        channels_per_granule: hidden channels of an expert that one granule of width has.
    """
    pool = torch.zeros(len(subnets), len(subnets[0]), num_experts, dtype=torch.bool)
    for s, layers in enumerate(subnets):
        for i, layer in enumerate(layers):
            pool[s, i, list(layer.expert_pool)] = True

    def column(field: str, dtype: torch.dtype = torch.int32) -> Tensor:
        values = [[getattr(layer, field) for layer in layers] for layers in subnets]
        return torch.tensor(values, dtype=dtype)

    return SubnetTable(
        active=column("active", torch.bool),
        top_k=column("top_k"),
        min_experts=column("min_experts"),
        threshold=column("sparsity_threshold", torch.float32),
        channels=column("expert_width") * channels_per_granule,
        pool=pool,
    )


class SubnetColumns(NamedTuple):
    """The tensors of a `SubnetTable`, contiguous: (S, L), and (S, L, E) for pool."""

    active: Tensor
    top_k: Tensor
    min_experts: Tensor
    threshold: Tensor
    channels: Tensor
    pool: Tensor


class GrowingTable:
    """A row for every sub-network that has users, in columns that grow when all rows are taken.

    One thread adds users and runs kernels; any thread may remove users. A row keeps its number
    while it has users. Afterwards it waits to be found again, until a new sub-network needs a row:
    of those without users, the one that was so for longest is taken.

    Args:
        num_layers, num_experts, channels_per_granule: of the model.
        check: raises for a sub-network that the model cannot run; called with a table of it alone.

    Attributes:
        columns: what kernels read; another object after growth. Rows without users are named by no
            batch, and hold what their last user left.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        channels_per_granule: int,
        check: Callable[[SubnetTable], None],
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
            *(
                torch.zeros((*shape, num_experts) if name == "pool" else shape, dtype=dtype)
                for name, dtype in _DTYPES.items()
            )
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
            table = build_table([layers], self._num_experts, self._channels_per_granule)
            self._check(table)
            if not self._unused:
                self._grow()
            row = next(iter(self._unused))
            self._row_of.pop(self._key_of[row], None)
            for name, column in zip(SubnetColumns._fields, self.columns, strict=True):
                column[row] = getattr(table, name)[0]
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
        """Twice the rows, in new tensors: a step that was prepared keeps the old ones."""
        old = len(self._users)
        more = max(old, FIRST_ROWS)
        with torch.inference_mode(False):  # later rows may be written outside of inference mode
            self.columns = SubnetColumns(
                *(torch.cat([c, c.new_zeros((more, *c.shape[1:]))]) for c in self.columns)
            )
        self._users += [0] * more
        self._key_of += [None] * more
        self._unused |= dict.fromkeys(range(old, old + more))


def _check_tensors(tensors: Mapping[str, Tensor], dims: str) -> None:
    """Dtypes, shapes and devices: nothing that reads values."""
    pool = tensors["pool"]
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise KernelError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
        if tensor.dtype != _DTYPES[name]:
            raise KernelError(
                f"{name} must be {_DTYPES[name]}, got {tensor.dtype}. Convert it with .to()."
            )
        shape = pool.shape if name == "pool" else pool.shape[:-1]
        if tensor.shape != shape or pool.dim() != dims.count(",") + 2:
            raise KernelError(
                f"{name} must have shape ({dims}{', E' if name == 'pool' else ''}) with "
                f"({dims}, E) the shape of pool, {tuple(pool.shape)}, got {tuple(tensor.shape)}."
            )
        if tensor.device != pool.device:
            raise KernelError(
                f"{name} is on {tensor.device} and pool on {pool.device}. "
                f"Move all tensors of a table to one device."
            )
    if pool.shape[-1] < 1:
        raise KernelError("pool must have at least one expert per row, got 0.")


def _check_values(
    top_k: Tensor,
    min_experts: Tensor,
    threshold: Tensor,
    channels: Tensor,
    pool: Tensor,
    used: Tensor | None,
) -> None:
    """Ranges of the entries where `used`; one combined test, taken apart only if it fails."""
    size = pool.sum(-1)
    # Written so that NaN fails.
    fine = {
        "top_k": (top_k >= 1) & (top_k <= size),
        "min_experts": (min_experts >= 1) & (min_experts <= top_k),
        "threshold": (threshold >= 0) & (threshold <= 1),
        "channels": channels >= 1,
    }
    good = fine["top_k"] & fine["min_experts"] & fine["threshold"] & fine["channels"]
    if bool((good if used is None else good | ~used).all()):
        return
    values = {
        "top_k": top_k,
        "min_experts": min_experts,
        "threshold": threshold,
        "channels": channels,
    }
    for name, ok in fine.items():
        bad = ~ok if used is None else ~ok & used
        if not bool(bad.any()):
            continue
        at = tuple(int(i) for i in bad.nonzero()[0])
        allowed = {
            "top_k": f"in [1, {int(size[at])}], the size of its pool",
            "min_experts": f"in [1, {int(top_k[at])}], its top_k",
            "threshold": "a number in [0, 1]",
            "channels": "at least 1",
        }[name]
        where = f"sub-network {at[0]}" + (f", layer {at[1]}" if len(at) > 1 else "")
        raise KernelError(f"{where}: {name} must be {allowed}, got {values[name][at].item()}.")
