"""From a sub-network's name to the sub-network."""

from __future__ import annotations

import re

from elastic_moe.errors import RoutingError
from elastic_moe.routing.checks import shorten
from elastic_moe.routing.resolution import resolve
from elastic_moe.routing.shape import ModelShape
from elastic_moe.routing.subnet import Subnet

# 9 digits are beyond any range; `int` refuses 4301.
_NAME = re.compile(
    r"(?=[^-])(?:L(?:(?P<depth>[0-9]{1,9})|x(?P<layers>[0-9a-f]+)))?(?:(?:^|-)k(?P<k>[0-9]{1,9}))?"
    r"(?:(?:^|-)m(?P<m>[0-9]{1,9}))?(?:(?:^|-)w(?P<w>[0-9]{1,9}))?"
    r"(?:(?:^|-)t(?P<t>[0-9]+(?:\.[0-9]+)?))?(?:(?:^|-)p(?P<p>[0-9]{1,9}))?"
)
_VALUES = re.compile(r"x[0-9a-f]{8}")  # per layer


def is_name(text: str) -> bool:
    """Whether a text has the form of a sub-network's name, whatever model has such a one."""
    return text == "full" or bool(_VALUES.fullmatch(text) or _NAME.fullmatch(text))


def parse_name(shape: ModelShape, name: str) -> Subnet:
    """The sub-network that a name means for this model; the inverse of `Subnet.name`.

    Raises:
        RoutingError: the text is no name, or a value is out of range.
    """
    if name == "full":
        return resolve(shape)
    if _VALUES.fullmatch(name):
        raise RoutingError(
            f"sub-network {name!r} has values per layer and cannot be built from its name. "
            f"Use the configuration that it came from."
        )
    match = _NAME.fullmatch(name)
    if match is None:
        raise RoutingError(
            f"{shorten(name)} is no sub-network name. Write 'full', or parts in this order, absent "
            f"parts meaning the full value: L36 (layers) k2 (top_k) m1 (min_experts) w6 "
            f"(expert_width) t0.7 (sparsity) p8 (expert_pool), joined by '-', such as "
            f"'L36-k2-w6-t0.7-p8'."
        )
    part: dict[str, str | None] = match.groupdict()
    bits = f"{int(part['layers'], 16):b}" if part["layers"] else ""
    numbers = {
        key: int(text)
        for key, text in part.items()
        if text and key in ["depth", "k", "m", "w", "p"]
    }
    return resolve(
        shape,
        depth=numbers.get("depth"),
        active_layers=[i for i, bit in enumerate(reversed(bits)) if bit == "1"] if bits else None,
        top_k=numbers.get("k"),
        min_experts=numbers.get("m"),
        expert_width=numbers.get("w"),
        sparsity_threshold=float(part["t"]) if part["t"] else None,
        expert_pool=numbers.get("p"),
    )
