"""Rotary angles are cosines and sines to the last bit of float32, made of plain arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest

from elastic_moe.model.rotary import rotary_angles

THETAS = [1e4, 5e5, 1e6, 5e6, 1e7]


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("head_dim", [2, 18, 32, 128])
def test_angles_are_rounded_once(head_dim: int, theta: float) -> None:
    cos, sin = rotary_angles(5000, head_dim, theta)
    assert cos.shape == sin.shape == (5000, head_dim // 2)
    assert cos.dtype == sin.dtype == np.float32
    powers = [
        np.float32(math.pow(theta, np.float32(i) / np.float32(head_dim)))
        for i in range(0, head_dim, 2)
    ]
    for channel, power in enumerate(powers):
        frequency = np.float32(1) / power
        for position in range(0, 5000, 7):
            angle = float(np.float32(position) * frequency)
            assert cos[position, channel] == np.float32(math.cos(angle))
            assert sin[position, channel] == np.float32(math.sin(angle))


def test_far_positions_are_as_exact() -> None:
    cos, sin = rotary_angles(1 << 20, 2, 1e4)
    for position in range((1 << 20) - 2000, 1 << 20):
        assert cos[position, 0] == np.float32(math.cos(position))
        assert sin[position, 0] == np.float32(math.sin(position))


def test_more_positions_change_none_before_them() -> None:
    few, many = rotary_angles(37, 32, 1e4), rotary_angles(4000, 32, 1e4)
    for part, whole in zip(few, many, strict=True):
        assert np.array_equal(part, whole[:37])
