from __future__ import annotations

from typing import Any

import pytest

from tests.server.conftest import Running

KEYS = ("first-key", "ACCESS:SECRET")


@pytest.fixture(scope="module")
def guarded(start: Any) -> Running:
    return start({"api_keys": KEYS, "max_body_bytes": 2000}, max_queue=2)
