"""One MoE layer in turns, its weights cold."""

from __future__ import annotations

import json
import tempfile
from typing import Any

import numpy as np

from benchmarks.peers.bars import (
    ZENTORCH,
    Round,
)
from benchmarks.peers.stage import (
    THREADS,
    Ask,
    Places,
    Processes,
    hold_errors,
    make_round,
    relative_error,
    turns,
)

STANDARD_LAYER = {"layers": 8, "experts": 64, "top_k": 8, "hidden": 1024, "channels": 512}
AWKWARD_LAYER = {"layers": 8, "experts": 61, "top_k": 5, "hidden": 1000, "channels": 520}


class LayerStage:
    """One MoE layer, cold: its cases are called layerT for T rows."""

    def __init__(self, places: Places, model: str) -> None:
        sizes = json.dumps(AWKWARD_LAYER if model == "awkward" else STANDARD_LAYER)
        self._processes = Processes()
        self.versions = self._processes.versions
        start = self._processes.start
        self._limits = start(places.project, "machine_limits", THREADS)
        slow = [] if places.slow is None else [places.slow]
        self._ours = start(places.project, "moe_layer", "ours", THREADS, sizes, *slow)
        self.identity: dict[str, Any] = self._ours.ask("identify")
        self._all = {"ours": self._ours}
        if model == "standard" and places.zentorch is not None:
            zentorch = start(places.zentorch, "moe_layer", ZENTORCH, THREADS, sizes)
            self._all[ZENTORCH] = zentorch
        if places.peers is not None:
            # One process for all of them: the weights are large.
            who = "grouped_mm" if model == "awkward" else "grouped_mm,eager"
            peer = start(places.peers, "moe_layer", who, THREADS, sizes)
            self._all |= {f"transformers {name}": peer for name in who.split(",")}

    def check(self) -> dict[str, float]:
        """Compare all outputs for 64 rows with float32. Raises: SystemExit: one is wrong."""
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/out.npy"
            self._ours.ask("exact", rows=64, path=path)
            exact, errors = np.load(path), {}
            for name, process in self._all.items():
                process.ask("outputs", rows=64, path=path, who=name)
                errors[name] = relative_error(np.load(path), exact)
        return hold_errors(errors, "transformers grouped_mm", "outputs")

    def measure(self, case: str, number: int) -> Round:
        """Round `number` of a case: every contestant once, right after the limits."""
        rows = int(case.rpartition("layer")[2])
        limits = self._limits.ask("measure")

        def ask(name: str) -> Ask:
            return lambda: self._all[name].ask("time_layers", rows=rows, repeats=3, who=name)

        results = turns({name: ask(name) for name in self._all}, number)
        results["ours"] |= self._ours.ask("work", rows=rows)
        return make_round(limits, results)

    def close(self) -> None:
        """End the contestants' processes and wait for them."""
        self._processes.stack.close()
