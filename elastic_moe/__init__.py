"""elastic-moe: one mixture-of-experts checkpoint, and every request chooses what it costs.

Importing this package loads neither torch nor pydantic; the names below load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic_moe.config import ElasticRoutingConfig as ElasticRoutingConfig
    from elastic_moe.engine import Completion as Completion
    from elastic_moe.engine import Delta as Delta
    from elastic_moe.engine import Engine as Engine
    from elastic_moe.engine import SamplingParams as SamplingParams
    from elastic_moe.routing import Subnet as Subnet

__version__ = "0.1.0"

_HOME = {
    "Completion": "elastic_moe.engine",
    "Delta": "elastic_moe.engine",
    "ElasticRoutingConfig": "elastic_moe.config",
    "Engine": "elastic_moe.engine",
    "SamplingParams": "elastic_moe.engine",
    "Subnet": "elastic_moe.routing",
}
__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'elastic_moe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
