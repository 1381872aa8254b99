"""The sweep: quality and cost of a grid of sub-networks of one checkpoint.

Writes `sweep.json`, `frontier.png` and `report.html`. `sweep.json` is written after every group of
sub-networks, so an interrupted sweep keeps what it finished, and the same call goes on from there.
A finished one is returned as it is. Results of another sweep in the folder are replaced on request
alone, and then kept as `sweep.previous.json`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from elastic_moe.engine import Engine
from elastic_moe.files import write_text
from elastic_moe.lab.bench.speed import Spread, measure_speed
from elastic_moe.lab.load import LoadMonitor
from elastic_moe.lab.provenance import describe_provenance
from elastic_moe.lab.schema import SCHEMA_VERSION, SweepPoint, SweepResult
from elastic_moe.lab.sweeps import record
from elastic_moe.lab.sweeps.grid import Grid, check_values, default_grid, groups, product_grid
from elastic_moe.lab.sweeps.quality import FullNetwork, Quality, measure_depths
from elastic_moe.lab.sweeps.results import (
    PREVIOUS,
    RESULT,
    keep_aside,
    prepare_folder,
    read_earlier,
)
from elastic_moe.lab.sweeps.text import (
    EvaluationSet,
    evaluation_set,
    language_reference,
    read_corpus,
)
from elastic_moe.lab.view.frontier import mark_pareto
from elastic_moe.model.checkpoints.checkpoint import load_config
from elastic_moe.model.checkpoints.folder import find_checkpoint
from elastic_moe.routing import ModelShape, Subnet
from elastic_moe.routing.axes import KEYS
from elastic_moe.routing.resolution import canonical

Progress = Callable[[str, int, int], None]
Notify = Callable[[str], None]


def _silent(*_: object) -> None:
    """The default for progress and notices: none."""


def sweep(
    model: str | Path | Engine = "elastic-mini",
    *,
    text: str | Path | None = None,
    tokens: int | None = None,
    out: str | Path = "sweep-out",
    quick: bool = False,
    overwrite: bool = False,
    rank_channels: str | Path | None = None,
    progress: Progress = _silent,
    notify: Notify = _silent,
    **axes: Sequence[Any] | None,
) -> SweepResult:
    """Measure a grid of sub-networks and write `sweep.json`, `frontier.png`, `report.html`.

    Args:
        model: a bundled name, a folder, or a loaded engine.
        text: a UTF-8 file to score; default is the language reference of the running Python.
        tokens: tokens to score, at most (default 12,032; 1,024 with quick).
        out: folder for the results; a sweep that was interrupted there is continued, the result of
            one that is finished is returned.
        quick: fewer points and tokens: about a minute on two cores.
        overwrite: measure anew and replace whatever result `out` holds.
        rank_channels: a UTF-8 file; each expert's channels are first ordered by their activation
            on it, in the engine itself where one was passed.
        progress: called with (stage, done, total).
        notify: called with a line about earlier results in `out`, and about an interruption.
        axes: depth, top_k, expert_width, sparsity, expert_pool or another spelling -> values to
            combine, each with each; an axis that is not given stays full. With none given: depth x
            top-k at quarters of the model's own values, and every other axis alone.

    Returns:
        The content of `sweep.json`.

    Raises:
        RoutingError: a value that is out of the model's range; nothing was measured.
        ResultExistsError: `out` holds the result of another sweep.
        ElasticMoEError: the model, a text or `out` cannot be used.
        KeyboardInterrupt: passed on, after the points that are done were written.
    """
    started = time.monotonic()
    known = canonical(axes)
    given = {key: known[key] for key in dict.fromkeys(KEYS.values()) if known.get(key) is not None}
    folder = Path(out)
    if given:  # before the weights, which may take minutes to load
        check_values(_shape_of(model), given)
    prepare_folder(folder)
    corpus = read_corpus(Path(text)) if text is not None else language_reference()
    calibration = read_corpus(Path(rank_channels)) if rank_channels is not None else None
    engine = model if isinstance(model, Engine) else Engine.from_pretrained(model)
    if calibration is not None:
        engine.rank_channels(calibration.text, progress=partial(progress, "ranking"))
    if tokens is None:
        tokens = 1_024 if quick else 12_032
    text_set = evaluation_set(corpus, engine.tokenizer, tokens)
    shape, elastic = engine.shape, engine.config.elastic
    grid = product_grid(shape, given) if given else default_grid(shape, elastic, quick=quick)
    ranked_on = calibration.name if calibration is not None else None
    settings = record.describe_settings(engine, quick=quick, ranked_on=ranked_on)
    run = _Run(engine, text_set, grid, settings, folder, progress, overwrite=overwrite)
    if run.earlier.finished is not None:
        notify(
            f"{folder / RESULT} is the finished result of this sweep: nothing was measured. "
            f"--overwrite measures again."
        )
        return run.earlier.finished
    if notice := run.resume_notice():
        notify(notice)
    try:
        run.measure_quality()
        decode_tokens = 16 if engine.backend == "reference" else 64  # a tenth of a second or so
        run.measure_speed(
            rounds=3 if quick else 5, decode_tokens=decode_tokens // 4 if quick else decode_tokens
        )
        run.result["complete"] = True
    except KeyboardInterrupt:
        notify(run.interrupt_notice())
        raise
    finally:
        run.result["seconds"] = round(time.monotonic() - started, 1)
        run.write()
    return run.result


def _shape_of(model: str | Path | Engine) -> ModelShape:
    return model.shape if isinstance(model, Engine) else load_config(find_checkpoint(model)).shape


class _Run:
    """A sweep in progress and its result so far."""

    def __init__(
        self,
        engine: Engine,
        text: EvaluationSet,
        grid: Grid,
        settings: dict[str, Any],
        folder: Path,
        progress: Progress,
        *,
        overwrite: bool,
    ) -> None:
        self.engine, self.text, self.grid = engine, text, grid
        self.folder, self.progress = folder, progress
        about = describe_provenance(engine.runner.threads)
        self.result: SweepResult = {
            "schema_version": SCHEMA_VERSION,
            "model": record.describe_model(engine),
            "corpus": text.describe(),
            "date": about["date"],
            "command": about["command"],
            "commit": about["commit"],
            "machine": about["machine"],
            "versions": about["versions"],
            "settings": settings,
            "skipped": grid.skipped,
            "points": [],
            "expert_use": None,
            "load": None,
            "complete": False,
            "seconds": 0.0,
        }
        names = [subnet.name for subnet in grid.subnets]
        self.earlier = read_earlier(folder, self.result, names, overwrite=overwrite)
        self.displace = bool(self.earlier.why_not)  # the old result, when there is a new one
        self.result["points"] = self.earlier.points
        self.result["expert_use"] = self.earlier.expert_use

    def resume_notice(self) -> str:
        """One line about earlier results in the folder; "" where there are none."""
        path, kept = self.folder / RESULT, len(self.earlier.points)
        if self.earlier.why_not:
            return f"{path} is not continued: {self.earlier.why_not}. It is kept as {PREVIOUS}."
        if not kept:
            return ""
        wanted = {subnet.name for subnet in self.grid.subnets}
        outside = sum(point["name"] not in wanted for point in self.earlier.points)
        return f"{path} is continued: {kept} sub-networks are kept" + (
            f", {outside} of them outside this grid." if outside else "."
        )

    def interrupt_notice(self) -> str:
        """One line about what an interrupted sweep has written."""
        count = len(self.result["points"])
        if not count:
            return f"No sub-network was finished; {self.folder} is as it was."
        return (
            f"{self.folder / RESULT} holds the {count} sub-networks that are done; "
            f"the same command goes on from there."
        )

    def measure_quality(self) -> None:
        """Fill in the points, bundle by bundle; the full network's bundle is first."""
        measured_names = {point["name"] for point in self.result["points"]}
        bundles = groups(self.grid.subnets)
        todo = [b for i, b in enumerate(bundles) if any(s.name not in measured_names for s in b[1])]
        if todo and todo[0] is not bundles[0]:  # what the others are compared with
            todo.insert(0, bundles[0])
        windows = len(self.text.windows)
        total = windows * len(todo)
        full = FullNetwork(self.text.scored_tokens, self.engine.config.vocab_size)
        reference: Quality | None = None
        for i, (deepest, members) in enumerate(todo):
            measured: dict[int, Quality] = {}
            depths = [subnet.depth for subnet in members]
            passes = measure_depths(
                self.engine.runner, self.text, deepest, depths, full, is_full=reference is None
            )
            for done, measured in passes:  # noqa: B007  (the last item is the result)
                self.progress("quality", i * windows + done, total)
            if reference is None:
                reference = measured[deepest.depth]
                self.result["expert_use"] = record.describe_expert_use(deepest.name, reference)
            for subnet in members:
                if subnet.name not in measured_names:
                    quality = measured[subnet.depth]
                    self._add(
                        record.describe_point(subnet, quality, reference, self.text, self.engine)
                    )
            self.write_json()

    def _add(self, point: SweepPoint) -> None:
        order = {subnet.name: i for i, subnet in enumerate(self.grid.subnets)}
        points = [*self.result["points"], point]
        points.sort(key=lambda p: order.get(p["name"], len(order)))  # outside the grid: last
        self.result["points"] = points

    def measure_speed(self, *, rounds: int, decode_tokens: int) -> None:
        """Fill in both speeds of every point of the grid, measured in turn."""
        by_name: dict[str, Subnet] = {subnet.name: subnet for subnet in self.grid.subnets}
        points = [point for point in self.result["points"] if point["name"] in by_name]
        subnets = [by_name[point["name"]] for point in points]
        ids = [token for window in self.text.windows[::2] for token in window.inputs]
        total = len(subnets) * rounds
        speeds: list[tuple[Spread, Spread]] = []
        load = LoadMonitor()
        timing = measure_speed(
            self.engine.runner, subnets, ids, rounds=rounds, decode_tokens=decode_tokens, load=load
        )
        for done, speeds in timing:  # noqa: B007  (the last item is the result)
            self.progress("speed", done, total)
        for point, (prefill, decode) in zip(points, speeds, strict=True):
            figures = record.describe_speed("prefill", prefill)
            figures |= record.describe_speed("decode", decode)
            point.update(cast(SweepPoint, figures))
        self.result["load"] = load.describe(threads=self.result["machine"]["threads"])

    def write_json(self) -> None:
        """Write what there is; never an empty result, which might replace one that is not."""
        if not self.result["points"]:
            return
        if self.displace:
            keep_aside(self.folder)
            self.displace = False
        mark_pareto(self.result["points"])
        text = json.dumps(self.result, indent=1, ensure_ascii=False, allow_nan=False)
        write_text(self.folder / RESULT, text + "\n")

    def write(self) -> None:
        """Write all three files, as far as there are points to show."""
        from elastic_moe.lab.view.frontier_plot import (
            write_frontier_png,  # deferred: matplotlib is slow to load
        )
        from elastic_moe.lab.view.report import write_report

        self.write_json()
        if self.result["points"]:
            write_frontier_png(self.result, self.folder / "frontier.png")
            write_report(self.result, self.folder / "report.html")
