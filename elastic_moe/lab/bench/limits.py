"""What this machine gives at most: how fast memory is read, and how fast matrices are multiplied.

A figure of a benchmark says little without them: decoding is bound by the one, prefill by the
other, and both differ from machine to machine and, on a shared one, from minute to minute.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from elastic_moe_kernels import native
from elastic_moe_kernels.packing import Arena
from torch import Tensor

READ_BYTES = 1 << 30
MATMUL_SIZE = 4096
READS = 6
MATMULS = 2


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one moment.

    Attributes:
        read_bytes_per_second: B, the best of some streaming reads of 1 GiB on ordinary pages.
        read_huge_bytes_per_second: the same on huge pages, where packed weights lie.
        matmul_flops_per_second: M, the best of some warm `torch.mm` of 4096^3.
        dtype: of that multiplication.
        threads: how many worked.
    """

    read_bytes_per_second: float
    read_huge_bytes_per_second: float
    matmul_flops_per_second: float
    dtype: str
    threads: int

    def to_json(self) -> dict[str, Any]:
        """The fields by name, as the result files hold them."""
        return asdict(self)


class LimitsProbe:
    """Measures the limits as often as asked; holds its buffers, so that nothing is set up twice.

    Args:
        dtype: of the multiplication.
        read_bytes: size of each of the two buffers, far more than the caches hold.
        matmul_size: n of the (n, n) by (n, n) multiplication.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.bfloat16,
        *,
        read_bytes: int = READ_BYTES,
        matmul_size: int = MATMUL_SIZE,
    ) -> None:
        self._ordinary = torch.empty(read_bytes, dtype=torch.uint8).fill_(1)
        self._huge = Arena(read_bytes).take(read_bytes).fill_(1)
        generator = torch.Generator().manual_seed(0)
        self._factors = [
            torch.randn(matmul_size, matmul_size, generator=generator).to(dtype) for _ in range(2)
        ]
        self._product = torch.empty(matmul_size, matmul_size, dtype=dtype)

    def measure(self, *, reads: int = READS, matmuls: int = MATMULS) -> Limits:
        """Measure now: the best of `reads` reads of each kind and of `matmuls` multiplications."""
        size = len(self._product)
        multiply = _best_seconds(
            lambda: torch.mm(*self._factors, out=self._product), matmuls, warm_up=True
        )
        return Limits(
            len(self._ordinary) / _best_seconds(lambda: _read(self._ordinary), reads),
            len(self._huge) / _best_seconds(lambda: _read(self._huge), reads),
            2 * size**3 / multiply,
            str(self._product.dtype).removeprefix("torch."),
            torch.get_num_threads(),
        )


def _read(buffer: Tensor) -> None:
    if native.missing():
        buffer.view(torch.int64).sum()
        return
    native.extension().probe(native.level_index(None), buffer.numpy(), torch.get_num_threads())


def _best_seconds(call: Callable[[], object], count: int, *, warm_up: bool = False) -> float:
    if warm_up:
        call()
    best = float("inf")
    for _ in range(count):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
