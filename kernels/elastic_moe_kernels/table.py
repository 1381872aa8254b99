"""The table that tells a kernel what each row of a batch may use.

A batch mixes sequences that run different sub-networks. Kernels see S distinct sub-networks as
arrays indexed [subnet][layer], and one subnet index per row (token). A table is checked once, when
it is made; kernels rely on that, so its tensors must not be written to afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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
