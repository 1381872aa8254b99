"""The committed measurements that the page of claims is made of, and its sentences."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic_moe.errors import BenchmarkError
from elastic_moe.model.checkpoints.folder import BUNDLED
from elastic_moe.model.checkpoints.weights import TensorFiles

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
MODEL = "elastic-mini"
SWEEP = "sweep-elastic-mini.json"
TEXT = "python-language-reference"
NOT_YET = "not measured yet"


class Results:
    """The committed measurements.

    Args:
        folder: of the result files; coherence.jsonl and science.jsonl may be missing. None: those
            of the repository.

    Raises:
        BenchmarkError: something in it was measured on other weights than the bundled ones, or the
            sweep on another text than the other losses.
    """

    def __init__(self, folder: Path | None = None) -> None:
        folder = RESULTS if folder is None else folder

        def lines(name: str) -> list[dict[str, Any]]:
            path = folder / name
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            return [json.loads(line) for line in text.splitlines()]

        sweep = json.loads((folder / SWEEP).read_text(encoding="utf-8"))
        quality = [line for line in lines("elastic-mini.jsonl") if line["corpus"]["name"] == TEXT]
        coherence = [line for line in lines("coherence.jsonl") if line["case"] == MODEL]
        self.mini: dict[str, Any] = quality[-1]
        bundled = TensorFiles(BUNDLED / MODEL).sha256()
        for name, weights in (
            ("elastic-mini.jsonl", self.mini["weights_sha256"]),
            (SWEEP, sweep["settings"].get("weights_sha256")),
            *(("coherence.jsonl", line["weights_sha256"]) for line in coherence[-1:]),
        ):
            if weights != bundled:
                raise BenchmarkError(
                    f"{folder / name} was measured on weights {_short(weights)}, but those of the "
                    f"bundled {MODEL} are {_short(bundled)}. Measure it again."
                )
        for key in ("name", "sha256"):
            if sweep["corpus"][key] != self.mini["corpus"][key]:
                raise BenchmarkError(
                    f"{folder / SWEEP} scored the text {sweep['corpus']['name']} "
                    f"{_short(sweep['corpus']['sha256'])}, elastic-mini.jsonl beside it {TEXT} "
                    f"{_short(self.mini['corpus']['sha256'])}. Measure both on one text."
                )
        self.peers = {line["case"]: line for line in lines("peers.jsonl")}
        self.sweep = {point["name"]: point for point in sweep["points"]}
        self.swept_tokens: int = sweep["corpus"]["scored_tokens"]
        self.scored_tokens: int = self.mini["corpus"]["scored_tokens"]
        found = [line for line in lines("science.jsonl") if line["kind"] == "summary"]
        self.science: dict[str, Any] | None = found[-1] if found else None

    def lost(self, point: str) -> str:
        """Nats per token that a sub-network of elastic-mini loses, with the standard error."""
        p = self.mini["points"][point]
        return f"elastic-mini `{point}`: {p['nats_lost']:+.3f} ± {p['standard_error']:.3f}"

    def swept(self) -> str:
        """What must be said of a figure of the sweep, where it scored less than the others."""
        alike = self.swept_tokens == self.scored_tokens
        return "" if alike else f" in the sweep, {self.swept_tokens:,} tokens scored"

    def science_point(self, point: str) -> Mapping[str, Any]:
        return {} if self.science is None else self.science["texts"][TEXT]["points"][point]

    def science_lost(self, point: str) -> str:
        """What a sub-network of the 12-layer runs loses, trained elastically and not."""
        lost = self.science_point(point).get("lost") or {}
        if not (lost.get("elastic") or lost.get("inelastic")):
            return f"12 layers `{point}`: {NOT_YET}"
        elastic, inelastic = _mean(lost.get("elastic")), _mean(lost.get("inelastic"))
        drawn = lost.get("drawn")
        one_a_step = f"; one network a step: {_mean(drawn)}" if drawn else ""
        return f"12 layers `{point}`: {elastic}{one_a_step}; inelastic: {inelastic}"

    def elastic_cost(self, point: str) -> str:
        """Nats per token, elastic minus inelastic: below 0 where elasticity helps."""
        return _mean(self.science_point(point).get("elastic_gain"), sign=-1)

    def frugal_cost(self, point: str) -> str:
        """As `elastic_cost`, with an eighth of the text on reduced networks, not a quarter."""
        return _mean(self.science_point(point).get("frugal_gain"), sign=-1)

    def drawn_cost(self, point: str) -> str:
        """As `elastic_cost`, of training one network a step."""
        return _mean(self.science_point(point).get("drawn_cost"))

    def specialist_gap(self, point: str) -> str:
        """Nats per token, elastic minus a network trained as this one alone."""
        return _mean(self.science_point(point).get("specialist_gain"))


def _short(sha256: str | None) -> str:
    return "that it does not name" if sha256 is None else f"{sha256[:12]}..."


def _mean(found: Mapping[str, Any] | None, *, sign: int = 1) -> str:
    if not found or not found["n"]:
        return NOT_YET
    # Of a difference of two families, what two runs of different seeds would show.
    sd = found.get("seed_sd", found["sd"])
    spread = "" if sd is None else f" ± {sd:.3f}"
    return f"{sign * found['mean']:+.3f}{spread} ({found['n']} seed{'s' * (found['n'] > 1)})"
