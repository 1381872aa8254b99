"""An array of neither numpy nor torch, as any other library hands it over."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray


class Foreign:
    def __init__(self, values: NDArray[Any]) -> None:
        self.values = values

    def __dlpack__(self, **options: Any) -> Any:
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.values.__dlpack_device__()
