"""A contiguous KV cache for the reference model: the plainest that its `Cache` protocol allows."""

from __future__ import annotations

import torch
from torch import Tensor

from elastic_moe.errors import EngineError


class LayerCache:
    """Keys and values of one layer: (B, G, capacity, d) each, filled up to `length`."""

    def __init__(self, capacity: int, dtype: torch.dtype | None) -> None:
        self.capacity = capacity
        self.dtype = dtype
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, G, T, d) keys and values; return all that are stored, in the inputs' dtype."""
        end = self.length + keys.shape[2]
        if end > self.capacity:
            raise EngineError(
                f"the KV cache holds {self.capacity} positions, {end} are needed. "
                f"Make it with a larger capacity."
            )
        if self._keys is None or self._values is None:
            room = (*keys.shape[:2], self.capacity, keys.shape[3])
            self._keys = keys.new_empty(room, dtype=self.dtype or keys.dtype)
            self._values = torch.empty_like(self._keys)
        self._keys[:, :, self.length : end] = keys
        self._values[:, :, self.length : end] = values
        self.length = end
        return self._keys[:, :, :end].to(keys.dtype), self._values[:, :, :end].to(values.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated."""
        return 0 if self._keys is None else 2 * self._keys.nbytes


class KVCache:
    """One `LayerCache` per layer, made when the layer first runs: an inactive layer stores nothing.

    Args:
        num_layers: layers of the model.
        capacity: positions that each sequence can hold.
        dtype: how keys and values are stored; None keeps the dtype that they arrive in.
    """

    def __init__(self, num_layers: int, capacity: int, dtype: torch.dtype | None = None) -> None:
        self.capacity = capacity
        self.length = 0
        self._dtype = dtype
        self._layers: list[LayerCache | None] = [None] * num_layers

    def layer(self, index: int) -> LayerCache:
        cache = self._layers[index]
        if cache is None:
            cache = self._layers[index] = LayerCache(self.capacity, self._dtype)
        return cache

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self._layers if layer is not None)
