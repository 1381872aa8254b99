"""Reads /metrics."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client.parser import text_string_to_metric_families

from tests.server.conftest import Running

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read(text: str) -> Samples:
    """Samples by name and labels other than model_name."""
    return {
        (sample.name, frozenset((k, v) for k, v in sample.labels.items() if k != "model_name")): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class Scraped:
    """What a server tells now."""

    def __init__(self, running: Running) -> None:
        self.samples = read(running.http.get("/metrics").raise_for_status().text)

    def __call__(self, name: str, **labels: str) -> float:
        return self.samples.get((name, frozenset(labels.items())), 0.0)


def scraped_when(running: Running, holds: Callable[[Scraped], bool]) -> Scraped:
    """The first scrape for which something holds."""
    until = time.monotonic() + 20
    while not holds(scraped := Scraped(running)):
        assert time.monotonic() < until, scraped.samples
        time.sleep(0.01)
    return scraped
