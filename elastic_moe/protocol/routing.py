"""A request's sub-network on the wire: `routing_config`, and what was applied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, create_model

from elastic_moe.config import RoutingConfig
from elastic_moe.protocol.base import Answer
from elastic_moe.routing import Subnet
from elastic_moe.routing.axes import AXES, DEPTH, PER_LAYER, count

__all__ = ["AppliedRouting", "Limited", "RoutingConfig", "changes", "values"]


def values(subnet: Subnet) -> dict[str, Any]:
    """A sub-network's values by their keys in answers: a `routing_config` of it.

    One value, or where layers differ one for each of the model's layers. A pool is a count, or a
    list of ids.
    """
    answer: dict[str, Any] = {
        DEPTH.wire: subnet.depth,
        str(DEPTH.members): list(subnet.active_layers),
    }
    for axis in PER_LAYER:
        column = subnet.column(axis.name)
        if any(value != column[0] for value in column):
            answer[axis.wire] = [list(v) if isinstance(v, tuple) else v for v in column]
        elif isinstance(column[0], tuple) and column[0] != tuple(range(len(column[0]))):
            answer[axis.wire] = list(column[0])
        else:
            answer[axis.wire] = count(column[0])
    return answer


def changes(asked: Subnet, applied: Subnet) -> dict[str, tuple[Any, Any]]:
    """Axis -> (value requested, value that runs), where these differ."""
    before, after = values(asked), values(applied)
    return {
        axis.wire: (before[axis.wire], after[axis.wire])
        for axis in AXES
        if before[axis.wire] != after[axis.wire]
    }


class Limited(Answer):
    """An axis on which something else ran than was requested."""

    asked: int | float | list[Any]
    applied: int | float | list[Any]


class _AppliedRouting(Answer):
    name: str = Field(description="such as L24-k2; full for the whole network")
    model: str = Field(description="the checkpoint's true name, whatever name was requested")
    active_params: int = Field(description="parameters that a token uses at most")
    flops_per_token: float = Field(
        description="2 per multiply-add; norms, router, head counted; at the request's mean "
        "context, with the measured mean_experts"
    )
    mean_experts: float = Field(
        description="experts that really ran, per token and active layer that routes"
    )
    profile: str | None = Field(None, description="the profile requested")
    limited: dict[str, Limited] | None = Field(
        None, description="axis -> value requested and value applied, where limits changed it"
    )


_TYPES: dict[str, Any] = {
    "count": int | list[int],
    "real": float | list[float],
    "set": int | list[int] | list[list[int]],
}


def _axis_fields() -> dict[str, Any]:
    """Field -> (type, required), as `create_model` takes them."""
    fields: dict[str, Any] = {}
    for axis in AXES:
        description = f"{axis.unit}; one value, or one for each of the model's layers"
        if axis.members is None:
            fields[axis.wire] = (_TYPES[axis.kind], Field(description=description))
        else:
            fields[axis.wire] = (int, Field(description=axis.unit))
            fields[axis.members] = (list[int], ...)
    return fields


if TYPE_CHECKING:

    class AppliedRouting(_AppliedRouting):
        """As below; its fields of axes exist at run time only."""

else:
    AppliedRouting = create_model(
        "AppliedRouting",
        __base__=_AppliedRouting,
        __module__=__name__,
        __doc__="""The sub-network that ran, and what it cost. It is a valid `routing_config`.""",
        **_axis_fields(),
    )
