"""The elastic axes, one row each. All that names, checks, limits, sweeps or trains them reads this.

To add an axis: a row in `AXES`, and the field of that name in `LayerSubnet`, which the kernels'
table is built from; its default, for layers without experts, is 0, or () of a set. Names,
resolution, `routing_config`, `ElasticRoutingConfig`, limits, sweeps, plots, training options and
the ledger follow. A new field changes every fingerprint.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from elastic_moe.routing.checks import as_float32
from elastic_moe.routing.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Axis:
    """One elastic axis.

    Attributes:
        name: argument of `resolve`, field of `LayerSubnet`, field of a sweep's point.
        letter: begins its part in a sub-network's name, such as k2.
        kind: count: an integer from 1; real: a float32 from 0; set: the first n members, or their
            ids.
        title: for headings.
        unit: counted by a value, or the value itself if it is real; for the axes of plots and for
            help, as in 'at most this share of the best score'.
        part: one of what the value counts, or drops, in words.
        size: attribute of `ModelShape` that holds the largest value; None: it is `largest`.
        largest: value where no size of the model bounds it.
        above_zero: whether 0 is out of a real axis's range.
        full: value of the whole network; None: the largest.
        cheaper: real values in this direction cost less; None: all cost the same.
        wire: key in answers, and in options as --max-KEY, --KEY, --reduce-KEY.
        client: field of `ElasticRoutingConfig`.
        spellings: accepted beside name, wire and client. Each is accepted in camelCase too.
        members: key of the ids where they have their own; otherwise `name` takes both.
        per_layer: whether each layer may have a value of its own.
        trained: key in a checkpoint's `trained`, one of the spellings. None: not drawn in training,
            nor limited or swept.
        chance: that a draw of training reduces it, unless a run says otherwise. ERNIE 5.0
            (arXiv:2602.04705) has 25 % for depth, 20 % for pool and top_k.
        bounded_by: name of the axis whose value, or number of members, this one cannot exceed.
        hint: ends the message about a wrong value; {most} is the largest.
    """

    name: str
    letter: str
    kind: Literal["count", "real", "set"]
    title: str
    unit: str
    part: str
    size: str | None = None
    largest: float = 1.0
    above_zero: bool = False
    full: int | float | None = None
    cheaper: Literal["lower", "higher"] | None = "lower"
    wire: str = ""
    client: str = ""
    spellings: tuple[str, ...] = ()
    members: str | None = None
    per_layer: bool = True
    trained: str | None = None
    chance: float = 0.0
    bounded_by: str | None = None
    hint: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "wire", self.wire or self.name)
        object.__setattr__(self, "client", self.client or self.name)
        if self.trained is not None and self.trained not in self.snake:
            raise ValueError(
                f"axis {self.name}: trained must be one of its spellings {', '.join(self.snake)}, "
                f"got {self.trained}. Add it to spellings."
            )

    @property
    def snake(self) -> tuple[str, ...]:
        """Every spelling in snake_case, the wire's first."""
        names = (self.wire, self.name, self.client, *self.spellings)
        return tuple(dict.fromkeys(names))

    @property
    def least(self) -> int | float:
        """Smallest value; with `above_zero` the bound that is no value itself."""
        return 0.0 if self.kind == "real" else 1

    def most(self, sizes: ModelShape | Mapping[str, Any]) -> Any:
        """Largest value, or number of members, in a model of these sizes."""
        if self.size is None:
            return self.largest
        return sizes[self.size] if isinstance(sizes, Mapping) else getattr(sizes, self.size)

    def whole(self, sizes: ModelShape | Mapping[str, Any]) -> Any:
        """Value, or number of members, in the whole network."""
        return self.most(sizes) if self.full is None else self.full

    def interval(self, most: float) -> str:
        """The range up to a largest value: '[1, 8]', or '(0, 4]' without 0."""
        return f"{'(' if self.above_zero else '['}{self.least:g}, {most:g}]"

    def contains(self, value: float, most: float) -> bool:
        """Whether a number is in the range up to a largest value."""
        # Of a positive float64, the float32 may be 0.
        return self.least <= value <= most and not (self.above_zero and as_float32(value) == 0)

    def option(self, prefix: str = "") -> list[str]:
        """Command-line flags, the one for the help first: ['--max-sparsity', ...]."""
        return [f"--{prefix}{spelling}".replace("_", "-") for spelling in self.snake]


DEPTH = Axis(
    "depth",
    "L",
    "set",
    title="Depth",
    unit="layers that run",
    part="layer",
    size="num_layers",
    members="active_layers",
    per_layer=False,
    trained="depth",
    chance=0.25,
)
TOP_K = Axis(
    "top_k",
    "k",
    "count",
    title="Top-k",
    unit="experts per token",
    part="expert per token",
    size="max_top_k",
    client="routing_top_k",
    trained="top_k",
    chance=0.2,
    bounded_by="expert_pool",
    hint="Lower routing_top_k or widen expert_pool.",
)
MIN_EXPERTS = Axis(
    "min_experts",
    "m",
    "count",
    title="Experts that are never dropped",
    unit="experts per token that no threshold drops",
    part="expert per token",
    size="max_top_k",
    full=1,
    bounded_by="top_k",
    hint="It cannot exceed top_k.",
)
WIDTH = Axis(
    "expert_width",
    "w",
    "count",
    title="Expert width",
    unit="granules of each expert",
    part="granule",
    size="width_granules",
    spellings=("width",),
    trained="width",
    chance=0.2,
    hint="The unit is 1/{most} of an expert's channels.",
)
THRESHOLD = Axis(
    "sparsity_threshold",
    "t",
    "real",
    title="Threshold",
    unit="share of the best score",
    part="expert per token",
    full=0.0,
    cheaper="higher",
    wire="sparsity",
    spellings=("threshold",),
    trained="threshold",
    chance=0.1,
    hint="0 keeps every expert.",
)
POOL = Axis(
    "expert_pool",
    "p",
    "set",
    title="Expert pool",
    unit="experts to choose from",
    part="expert",
    size="num_experts",
    spellings=("pool",),
    trained="pool",
    chance=0.2,
    hint="It counts experts.",
)

AXES: tuple[Axis, ...] = (
    DEPTH,
    TOP_K,
    MIN_EXPERTS,
    WIDTH,
    THRESHOLD,
    POOL,
)  # a name's order


@dataclass(frozen=True, slots=True)
class LayerSubnet:
    """One layer's share of a sub-network. Only `active` counts where no experts are routed.

    Attributes:
        active: False makes the layer the identity, attention included.
        top_k: experts per token.
        min_experts: experts that the threshold never drops.
        expert_width: granules of each expert's hidden channels that run.
        sparsity_threshold: drops a selected expert whose score is below this x the token's best; a
            float32 value.
        expert_pool: ids of the experts that may be chosen, ascending.
    """

    active: bool
    top_k: int = 0
    min_experts: int = 0
    expert_width: int = 0
    sparsity_threshold: float = 0.0
    expert_pool: tuple[int, ...] = ()


PER_LAYER = tuple(axis for axis in AXES if axis.per_layer)
TRAINED = tuple(axis for axis in AXES if axis.trained)  # drawn in training, limited and swept


def _bounds_first() -> tuple[Axis, ...]:
    order: list[Axis] = []
    waiting = list(PER_LAYER)
    while waiting:
        done = [None, *(axis.name for axis in order)]
        ready = [axis for axis in waiting if axis.bounded_by in done]
        if not ready:
            raise ValueError(f"{waiting[0].name} is bounded by {waiting[0].bounded_by}: no axis.")
        order += ready
        waiting = [axis for axis in waiting if axis not in ready]
    return tuple(order)


BOUNDS_FIRST = _bounds_first()  # the per-layer axes, each after the one that bounds it


def camel(name: str) -> str:
    """'routing_top_k' -> 'routingTopK'."""
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def _keys() -> dict[str, str]:
    table = {}
    for axis in AXES:
        for spelling in axis.snake:
            table[spelling] = table[camel(spelling)] = axis.name
        if axis.members is not None:
            table[axis.members] = table[camel(axis.members)] = axis.members
    return table


KEYS = _keys()  # every accepted spelling -> argument of `resolve`
_BY_NAME = {axis.name: axis for axis in AXES}


def find(spelling: str) -> Axis:
    """The axis of any spelling; KeyError if there is none."""
    return _BY_NAME[KEYS[spelling]]


def spellings(key: str) -> tuple[str, ...]:
    """Every accepted spelling of an argument of `resolve`, in snake_case and in camelCase."""
    return tuple(spelling for spelling, meant in KEYS.items() if meant == key)


def count(value: Any) -> Any:
    """`value` as one number: of a set how many members it has."""
    return len(value) if isinstance(value, tuple) else value


def was_trained(axis: Axis, value: Any, whole: Any, drawn: Iterable[float] | None) -> bool:
    """Whether a checkpoint was trained for a value of an axis.

    The whole network's value always is. A count must have been drawn itself. A real one is drawn
    from a continuous range, so it must lie within the reduced values drawn.

    Args:
        value: a number; None (layers differ) was not trained.
        whole: value of the whole network.
        drawn: values that training drew, from `trained`.
    """
    if value == whole:
        return True
    values = list(drawn or ())
    if value is None or not values:
        return False
    # A real value is a float32 in a sub-network and a decimal in a configuration.
    if any(math.isclose(value, each, rel_tol=1e-6) for each in values):
        return True
    reduced = [each for each in values if each not in (whole, axis.full)]
    return axis.kind == "real" and bool(reduced) and min(reduced) <= value <= max(reduced)
