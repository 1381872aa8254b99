"""Placement of labels beside dots so that none covers another: geometry, no drawing.

Lengths are in any one unit, x to the right and y up. Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Segment = tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Box:
    """An axis-parallel rectangle, from (x0, y0) below left to (x1, y1)."""

    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def centre(self) -> tuple[float, float]:
        """The point (x, y) in the middle of the box."""
        return (self.x0 + self.x1) / 2, (self.y0 + self.y1) / 2

    def overlaps(self, other: Box) -> bool:
        """Whether the two share more than an edge."""
        return (
            self.x0 < other.x1 and other.x0 < self.x1 and self.y0 < other.y1 and other.y0 < self.y1
        )

    def inside(self, other: Box) -> bool:
        """Whether no part of this box is outside the other."""
        return (
            self.x0 >= other.x0
            and self.x1 <= other.x1
            and self.y0 >= other.y0
            and self.y1 <= other.y1
        )

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """The point of the box that is nearest to (x, y)."""
        return min(max(x, self.x0), self.x1), min(max(y, self.y0), self.y1)

    def crosses(self, segment: Segment) -> bool:
        """Whether any part of the segment lies inside (Liang and Barsky's clipping)."""
        (ax, ay), (bx, by) = segment
        enter, leave = 0.0, 1.0
        for start, step, low, high in (
            (ax, bx - ax, self.x0, self.x1),
            (ay, by - ay, self.y0, self.y1),
        ):
            if step == 0:
                if not low < start < high:
                    return False
                continue
            first, last = sorted(((low - start) / step, (high - start) / step))
            enter, leave = max(enter, first), min(leave, last)
        return enter < leave


def place_labels(
    dots: Sequence[Box],
    sizes: Sequence[tuple[float, float]],
    obstacles: Sequence[Box],
    lines: Sequence[Segment],
    bounds: Box,
    toward: tuple[float, float],
) -> list[Box | None]:
    """Choose a place for each label.

    Args:
        dots: what each label names.
        sizes: (width, height) of each label.
        obstacles: what no label may cover: all markers (the dots among them), other text.
        lines: what a label should rather not cover.
        bounds: where labels must lie.
        toward: the direction of the side to prefer, where the plot is empty.

    Returns:
        For each label its box, or None where no free place is near enough. No box overlaps
        another or an obstacle.
    """
    placed: list[Box | None] = []
    for dot, (width, height) in zip(dots, sizes, strict=True):
        best, best_score = None, math.inf
        taken = [box for box in placed if box is not None]
        x, y = dot.centre
        for gap in (0.1, 0.4, 0.8, 1.3, 1.9, 2.7, 3.6):  # in label heights
            for step in range(16):
                angle = step * math.pi / 8
                dx, dy = math.cos(angle), math.sin(angle)
                reach_x = (dot.x1 - dot.x0) / 2 + gap * height + width / 2
                reach_y = (dot.y1 - dot.y0) / 2 + gap * height + height / 2
                # On the outline of a rectangle around the dot, not a circle: labels are wide.
                scale = 1 / max(abs(dx), abs(dy))
                cx, cy = x + dx * scale * reach_x, y + dy * scale * reach_y
                box = Box(cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
                score = 3 * gap - (dx * toward[0] + dy * toward[1]) / math.hypot(*toward)
                if score >= best_score or not box.inside(bounds):
                    continue  # what follows only adds to the score, and takes longer
                if any(box.overlaps(other) for other in (*obstacles, *taken)):
                    continue
                leader = ((x, y), box.nearest(x, y))
                score += 4 * sum(box.crosses(line) for line in lines)
                score += 6 * sum(other.crosses(leader) for other in taken)
                score += 2 * sum(o.crosses(leader) for o in obstacles if not o.overlaps(dot))
                if score < best_score:
                    best, best_score = box, score
        placed.append(best)
    return placed
