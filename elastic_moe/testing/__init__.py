"""Test a client of a language model against a real server: what the pytest plugin is made of.

Standard library alone; nothing here loads torch. The server is a process of its own.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic_moe.testing.faults import Faults as Faults
    from elastic_moe.testing.findings import NotResilientError as NotResilientError
    from elastic_moe.testing.records import RequestRecord as RequestRecord
    from elastic_moe.testing.resilience import assert_resilient as assert_resilient
    from elastic_moe.testing.server import ElasticMoEServer as ElasticMoEServer
    from elastic_moe.testing.server import start_server as start_server

_HOME = {
    "ElasticMoEServer": "elastic_moe.testing.server",
    "Faults": "elastic_moe.testing.faults",
    "NotResilientError": "elastic_moe.testing.findings",
    "RequestRecord": "elastic_moe.testing.records",
    "assert_resilient": "elastic_moe.testing.resilience",
    "start_server": "elastic_moe.testing.server",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'elastic_moe.testing' has no attribute {name!r}")
