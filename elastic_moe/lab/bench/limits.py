"""What this machine gives at most: how fast memory is read, and how fast numbers are multiplied.

A figure of a benchmark says little without them: decoding is bound by the one, prefill by the
other, and both differ from machine to machine and, on a shared one, from minute to minute.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from elastic_moe_kernels import native
from elastic_moe_kernels.packing import Arena
from numpy.typing import NDArray

READ_BYTES = 1 << 30
READS = 6
MULTIPLY_SECONDS = 0.05
MULTIPLIES = 4
MATMUL_SIZE = 2048  # where the kernels are not compiled


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one moment.

    Attributes:
        read_bytes_per_second: B, the best of some reads of 1 GiB on ordinary and on huge pages, in
            several patterns: without prefetch, with it, and of several places at a time.
        read_huge_bytes_per_second: on huge pages alone, where packed weights lie.
        matmul_flops_per_second: M, the best rate of the level's multiply-add instructions on sums
            that stay in registers and inputs that stay in the first cache; no product of matrices
            is faster. Without compiled kernels: a float32 product of numpy.
        dtype: of what is multiplied.
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
        dtype: "bfloat16" or "float32", of what is multiplied.
        read_bytes: size of each of the two buffers, far more than the caches hold.
        multiply_seconds: about how long one measurement of multiplications lasts.
        threads: that work; None for the kernels' default.
    """

    def __init__(
        self,
        dtype: str = "bfloat16",
        *,
        read_bytes: int = READ_BYTES,
        multiply_seconds: float = MULTIPLY_SECONDS,
        threads: int | None = None,
    ) -> None:
        self._ordinary = np.full(read_bytes, 1, np.uint8)
        self._huge = Arena(read_bytes).take(read_bytes)
        self._huge.fill(1)
        self._threads = native.check_threads(threads)
        if native.missing():
            self._dtype, self._multiply = "float32", _multiply_matrices()
            self._patterns: list[Callable[[NDArray[np.uint8]], object]] = [_sum]
        else:
            self._dtype = dtype
            self._multiply = _multiply_in_registers(dtype, multiply_seconds, self._threads)
            self._patterns = _read_patterns(self._threads)

    def measure(self, *, reads: int = READS, multiplies: int = MULTIPLIES) -> Limits:
        """Measure now.

        Args:
            reads: of each kind and pattern; the fastest counts.
            multiplies: of the multiplications; the fastest counts.
        """
        huge = self._read_speed(self._huge, reads)
        return Limits(
            max(huge, self._read_speed(self._ordinary, reads)),
            huge,
            max(_rate(self._multiply) for _ in range(multiplies)),
            self._dtype,
            self._threads,
        )

    def _read_speed(self, buffer: NDArray[np.uint8], reads: int) -> float:
        def read(pattern: Callable[[NDArray[np.uint8]], object]) -> float:
            pattern(buffer)
            return buffer.size

        return max(
            _rate(lambda: read(pattern))  # noqa: B023  (called at once)
            for _ in range(reads)
            for pattern in self._patterns
        )


def _rate(call: Callable[[], float]) -> float:
    start = time.perf_counter()
    amount = call()
    return amount / (time.perf_counter() - start)


def _read_patterns(threads: int) -> list[Callable[[NDArray[np.uint8]], object]]:
    extension, level = native.extension(), native.level_index(None)

    def reader(pattern: int) -> Callable[[NDArray[np.uint8]], object]:
        return lambda buffer: extension.probe_read(level, buffer, pattern, threads)

    return [reader(pattern) for pattern in range(extension.read_patterns(level))]


def _sum(buffer: NDArray[np.uint8]) -> object:
    return buffer.view(np.int64).sum()


def _multiply_in_registers(dtype: str, seconds: float, threads: int) -> Callable[[], float]:
    extension, level = native.extension(), native.level_index(None)
    is_bf16 = dtype == "bfloat16"

    def multiply(turns: int) -> float:
        return float(extension.probe_multiply(level, is_bf16, turns, threads))

    turns = 1 << 14
    multiply(turns)  # warms up
    start = time.perf_counter()
    multiply(turns)
    elapsed = time.perf_counter() - start
    turns = max(1, round(turns * seconds / elapsed))
    return lambda: multiply(turns)


def _multiply_matrices(size: int = MATMUL_SIZE) -> Callable[[], float]:
    factor = np.full((size, size), 0.5, np.float32)
    product = np.empty_like(factor)

    def multiply() -> float:
        np.matmul(factor, factor, out=product)
        return 2.0 * size**3

    multiply()  # warms up
    return multiply
