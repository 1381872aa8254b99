"""The sweep: quality and cost of a grid of sub-networks of one checkpoint.

Writes `sweep.json`, `frontier.png` and `report.html`. `sweep.json` is written after every group of
sub-networks, so an interrupted sweep keeps what it finished, and the same call goes on from there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from elastic_moe.engine import Engine
from elastic_moe.errors import ElasticMoEError
from elastic_moe.files import write_text
from elastic_moe.lab import record
from elastic_moe.lab.frontier import mark_pareto
from elastic_moe.lab.grid import Grid, default_grid, groups, product_grid
from elastic_moe.lab.quality import FullNetwork, Quality, measure_depths
from elastic_moe.lab.speed import measure_speed
from elastic_moe.lab.text import EvaluationSet, evaluation_set, language_reference, read_corpus
from elastic_moe.routing import Subnet

Progress = Callable[[str, int, int], None]
RESULT = "sweep.json"


def _silent(stage: str, done: int, total: int) -> None:
    """The default progress: none."""


def sweep(
    model: str | Path | Engine = "elastic-mini",
    *,
    depth: Sequence[int] | None = None,
    top_k: Sequence[int] | None = None,
    expert_width: Sequence[int] | None = None,
    sparsity: Sequence[float] | None = None,
    expert_pool: Sequence[int] | None = None,
    text: str | Path | None = None,
    tokens: int | None = None,
    out: str | Path = "sweep-out",
    quick: bool = False,
    progress: Progress = _silent,
) -> dict[str, Any]:
    """Measure a grid of sub-networks and write `sweep.json`, `frontier.png`, `report.html`.

    Args:
        model: a bundled name, a folder, or a loaded engine.
        depth, top_k, expert_width, sparsity, expert_pool: values to combine, each with each; an
            axis that is not given stays full. With none given: depth x top-k at quarters of the
            model's own values, and every other axis alone.
        text: a UTF-8 file to score; default is the language reference of the running Python.
        tokens: tokens to score, at most (default 12,032; 1,024 with quick).
        out: folder for the results; a sweep that was interrupted there is continued.
        quick: fewer points and tokens: about a minute on two cores.
        progress: called with (stage, done, total).

    Returns:
        The content of `sweep.json`.

    Raises:
        ElasticMoEError: the model or text cannot be used, or no point is possible.
        KeyboardInterrupt: passed on, after the points that are done were written.
    """
    started = time.monotonic()
    engine = model if isinstance(model, Engine) else Engine.from_pretrained(model)
    corpus = read_corpus(Path(text)) if text is not None else language_reference()
    if tokens is None:
        tokens = 1_024 if quick else 12_032
    text_set = evaluation_set(corpus, engine.tokenizer, tokens)
    axes = {
        "depth": depth,
        "top_k": top_k,
        "expert_width": expert_width,
        "sparsity_threshold": sparsity,
        "expert_pool": expert_pool,
    }
    given = {axis: values for axis, values in axes.items() if values is not None}
    shape, elastic = engine.model.shape, engine.model.config.elastic
    grid = product_grid(shape, given) if given else default_grid(shape, elastic, quick=quick)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    run = _Run(engine, text_set, grid, folder, quick, progress)
    try:
        run.measure_quality()
        run.measure_speed(rounds=1 if quick else 3, decode_tokens=4 if quick else 16)
        run.result["complete"] = True
    finally:
        run.result["seconds"] = round(time.monotonic() - started, 1)
        run.write()
    return run.result


class _Run:
    """A sweep in progress and its result so far."""

    def __init__(
        self,
        engine: Engine,
        text: EvaluationSet,
        grid: Grid,
        folder: Path,
        quick: bool,
        progress: Progress,
    ) -> None:
        self.engine, self.text, self.grid = engine, text, grid
        self.folder, self.progress = folder, progress
        self.result: dict[str, Any] = {
            "schema_version": record.SCHEMA_VERSION,
            "model": record.describe_model(engine),
            "corpus": text.describe(),
            "machine": record.describe_machine(),
            "versions": record.describe_versions(),
            "settings": {
                "weights_sha256": engine.weights_sha256,
                "backend": engine.backend,
                "dtype": engine.dtype,
                "quick": quick,
            },
            "skipped": grid.skipped,
            "points": [],
            "expert_use": None,
            "complete": False,
            "seconds": 0.0,
        }
        self._resume()

    def _resume(self) -> None:
        """Take over the points of an interrupted sweep of the same model, text and settings."""
        path = self.folder / RESULT
        if not path.is_file():
            return
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ElasticMoEError(
                f"{path} is no JSON ({error}). Move it away or use --out."
            ) from error
        same = all(
            before.get(key) == self.result[key]
            for key in ("schema_version", "corpus", "settings", "machine", "versions")
        )
        if same and not before.get("complete"):
            wanted = {subnet.name for subnet in self.grid.subnets}
            self.result["points"] = [p for p in before["points"] if p["name"] in wanted]
            self.result["expert_use"] = before["expert_use"]

    def measure_quality(self) -> None:
        """Fill in the points, bundle by bundle; the full network's bundle is first."""
        have = {point["name"] for point in self.result["points"]}
        bundles = groups(self.grid.subnets)
        todo = [b for i, b in enumerate(bundles) if any(s.name not in have for s in b[1])]
        if todo and todo[0] is not bundles[0]:  # what the others are compared with
            todo.insert(0, bundles[0])
        windows = len(self.text.windows)
        total = windows * len(todo)
        full = FullNetwork(self.text.scored_tokens, self.engine.model.config.vocab_size)
        reference: Quality | None = None
        for i, (deepest, members) in enumerate(todo):
            measured: dict[int, Quality] = {}
            depths = [subnet.depth for subnet in members]
            passes = measure_depths(
                self.engine.model, self.text, deepest, depths, full, is_full=reference is None
            )
            for done, measured in passes:  # noqa: B007  (the last item is the result)
                self.progress("quality", i * windows + done, total)
            if reference is None:
                reference = measured[deepest.depth]
                use = [reference.expert_use[layer] for layer in sorted(reference.expert_use)]
                self.result["expert_use"] = {"name": deepest.name, "layers": use}
            for subnet in members:
                if subnet.name not in have:
                    quality = measured[subnet.depth]
                    self._add(
                        record.describe_point(subnet, quality, reference, self.text, self.engine)
                    )
            self.write_json()

    def _add(self, point: dict[str, Any]) -> None:
        order = [subnet.name for subnet in self.grid.subnets]
        points = [*self.result["points"], point]
        self.result["points"] = sorted(points, key=lambda p: order.index(p["name"]))

    def measure_speed(self, *, rounds: int, decode_tokens: int) -> None:
        """Fill in both speeds of every point, measured in turn."""
        by_name: dict[str, Subnet] = {subnet.name: subnet for subnet in self.grid.subnets}
        subnets = [by_name[point["name"]] for point in self.result["points"]]
        ids = [token for window in self.text.windows[::2] for token in window.inputs]
        total = len(subnets) * rounds
        speeds: list[tuple[float, float]] = []
        timing = measure_speed(
            self.engine.model, subnets, ids, rounds=rounds, decode_tokens=decode_tokens
        )
        for done, speeds in timing:  # noqa: B007  (the last item is the result)
            self.progress("speed", done, total)
        for point, (prefill, decode) in zip(self.result["points"], speeds, strict=True):
            point["prefill_tokens_per_second"] = round(prefill, 2)
            point["decode_tokens_per_second"] = round(decode, 2)

    def write_json(self) -> None:
        mark_pareto(self.result["points"])
        text = json.dumps(self.result, indent=1, ensure_ascii=False, allow_nan=False)
        write_text(self.folder / RESULT, text + "\n")

    def write(self) -> None:
        """Write all three files, as far as there are points to show."""
        from elastic_moe.lab.plots import write_frontier_png  # deferred: matplotlib is slow to load
        from elastic_moe.lab.report import write_report

        self.write_json()
        if self.result["points"]:
            write_frontier_png(self.result, self.folder / "frontier.png")
            write_report(self.result, self.folder / "report.html")
