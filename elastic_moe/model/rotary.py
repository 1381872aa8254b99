"""The angles of rotary position embeddings (RoFormer, arXiv:2104.09864).

Texts must not depend on the processor, and the cosines of libraries differ in their last bits from
one to the next. Here they are made of additions and multiplications of float64, which do not; all
but the last rounding, to float32, are far below it.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
# pi / 2 in three parts; products of the first two with 20-bit integers are exact.
_HALF_PI = (1.5707963267341256, 6.077100506303966e-11, 2.0222662487959506e-21)
_TERMS = 8  # of the series, which then are right to the last bits of float64


def rotary_angles(positions: int, head_dim: int, theta: float) -> tuple[Floats, Floats]:
    """Cosines and sines of the angles of positions 0, 1, ...: each (positions, d/2), read-only."""
    cos, sin = _table(max(positions - 1, 0).bit_length(), head_dim, theta)
    return cos[:positions], sin[:positions]


@lru_cache(maxsize=4)
def _table(positions_log2: int, head_dim: int, theta: float) -> tuple[Floats, Floats]:
    """Of so many positions that a sequence which grows needs few tables."""
    positions = 1 << positions_log2
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.array([math.pow(theta, e) for e in exponents.tolist()], dtype=np.float32)
    frequencies = np.float32(1) / powers  # (d/2,)
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies
    quarters, rest = _reduced(angles.astype(np.float64))
    cos, sin = _cos(rest), _sin(rest)
    turned = quarters % 4
    of_cos = np.choose(turned, (cos, -sin, -cos, sin)).astype(np.float32)
    of_sin = np.choose(turned, (sin, cos, -sin, -cos)).astype(np.float32)
    of_cos.flags.writeable = of_sin.flags.writeable = False
    return of_cos, of_sin


def _reduced(x: Doubles) -> tuple[NDArray[np.int64], Doubles]:
    """The number of quarter turns in x >= 0, and what is left, in [-pi/4, pi/4]."""
    count = np.floor(x / _HALF_PI[0] + 0.5)
    for part in _HALF_PI:
        x = x - count * part
    return count.astype(np.int64), x


def _cos(x: Doubles) -> Doubles:
    return _series(x * x, [(-1) ** n / math.factorial(2 * n) for n in range(_TERMS + 1)])


def _sin(x: Doubles) -> Doubles:
    return x * _series(x * x, [(-1) ** n / math.factorial(2 * n + 1) for n in range(_TERMS + 1)])


def _series(x: Doubles, coefficients: list[float]) -> Doubles:
    """The polynomial with these coefficients, lowest first."""
    total = np.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total * x + coefficient
    return total
