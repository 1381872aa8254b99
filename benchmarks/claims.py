"""What is published about elastic mixtures of experts, beside what was measured here.

python -m benchmarks.claims            writes benchmarks/CLAIMS.md
python -m benchmarks.claims --check    exits 1 if the page is not up to date

The published side is data of this file, each with its source. The measured side is read from
benchmarks/results and from the bundled checkpoint's manifest; nothing of it stands here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic_moe.files import write_text
from elastic_moe.lab.budget import make_budget
from elastic_moe.lab.frontier import format_percent, format_si
from elastic_moe.lab.trained import read_training
from elastic_moe.routing import parse_name

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PAGE = HERE / "CLAIMS.md"
TEXT = "python-language-reference"
NOT_YET = "not measured yet"

ERNIE = "ERNIE 5.0, [2602.04705](https://arxiv.org/abs/2602.04705)"
ERNIE_51 = "ERNIE 5.1, [announcement](https://ernie.baidu.com/blog/posts/ernie-5.1-0508-release/)"
MATFORMER = "MatFormer, [2310.07707](https://arxiv.org/abs/2310.07707)"
MOSE = "MoSE, [2602.06154](https://arxiv.org/abs/2602.06154)"
NAEE = "NAEE, [2402.14800](https://arxiv.org/abs/2402.14800)"
SLIMMABLE = "Universally slimmable networks, [1903.05134](https://arxiv.org/abs/1903.05134)"


class Results:
    """The committed measurements.

    Args:
        folder: of the result files; science.jsonl may be missing.
    """

    def __init__(self, folder: Path = RESULTS) -> None:
        def lines(name: str) -> list[dict[str, Any]]:
            path = folder / name
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            return [json.loads(line) for line in text.splitlines()]

        quality = [line for line in lines("elastic-mini.jsonl") if line["corpus"]["name"] == TEXT]
        self.mini: dict[str, Any] = quality[-1]
        self.peers = {line["case"]: line for line in lines("peers.jsonl")}
        sweep = json.loads((folder / "sweep-elastic-mini.json").read_text(encoding="utf-8"))
        self.sweep = {point["name"]: point for point in sweep["points"]}
        found = [line for line in lines("science.jsonl") if line["kind"] == "summary"]
        self.science: dict[str, Any] | None = found[-1] if found else None

    def lost(self, point: str) -> str:
        """Nats per token that a sub-network of elastic-mini loses, with the standard error."""
        p = self.mini["points"][point]
        return f"elastic-mini `{point}`: {p['nats_lost']:+.3f} ± {p['standard_error']:.3f}"

    def science_point(self, point: str) -> Mapping[str, Any]:
        return {} if self.science is None else self.science["texts"][TEXT]["points"][point]

    def science_lost(self, point: str) -> str:
        """What a sub-network of the 12-layer runs loses, trained elastically and not."""
        lost = self.science_point(point).get("lost") or {}
        if not (lost.get("elastic") or lost.get("inelastic")):
            return f"12 layers `{point}`: {NOT_YET}"
        elastic, inelastic = _mean(lost.get("elastic")), _mean(lost.get("inelastic"))
        return f"12 layers `{point}`: {elastic}; inelastic: {inelastic}"

    def elastic_cost(self, point: str) -> str:
        """Nats per token, elastic minus inelastic: below 0 where elasticity helps."""
        return _mean(self.science_point(point).get("elastic_gain"), sign=-1)

    def specialist_gap(self, point: str) -> str:
        """Nats per token, elastic minus a network trained as this one alone."""
        return _mean(self.science_point(point).get("specialist_gain"))


def _mean(found: Mapping[str, Any] | None, *, sign: int = 1) -> str:
    if not found or not found["n"]:
        return NOT_YET
    spread = "" if found["sd"] is None else f" ± {found['sd']:.3f}"
    return f"{sign * found['mean']:+.3f}{spread} ({found['n']} seed{'s' * (found['n'] > 1)})"


# --- what is measured, row by row


def axis(point: str, science: str) -> Callable[[Results], str]:
    """The loss of one reduced network, of the bundled checkpoint and of the 12-layer runs."""
    return lambda results: f"{results.lost(point)}. {results.science_lost(science)}"


def full_budget(results: Results) -> str:
    return f"12 layers, all axes at once, whole network: {results.elastic_cost('full')}"


def quarter_of_k(results: Results) -> str:
    record = results.peers["mix k"]
    rounds = [r["other"] for r in record["rounds"]]
    ratio = statistics.median(r["full seconds"] / r["k2 seconds"] for r in rounds)
    return (
        f"olmoe-0.9b, 16 sequences, {record['machine']['cores']} CPU cores: k 8 -> 2 decodes "
        f"{format_percent(ratio - 1)} faster"
    )


def iteration(_: Results) -> str:
    training = read_training("elastic-mini")
    chosen = parse_name(training.shape, "L24-k2")
    # So many tokens that the refinement is 6 % of the super-network: the claim, set into a ledger.
    per_token = make_budget(training, [(chosen, 1)])["networks"][0]["refinement_of_super_network"]
    tokens = round(0.06 / per_token)
    budget = make_budget(training, [(chosen, tokens)], networks=8)
    row, uncounted = budget["networks"][0], budget["super_network"]["uncounted"]
    but = f" Not counted: what {uncounted['parent']} had cost" if uncounted else ""
    costs = {one["networks"]: one for one in row["shared"]}
    return (
        f"`elastic-moe budget`, not a result but a ledger: 6 % of elastic-mini's training is "
        f"{format_si(tokens)} tokens of refining its `L24-k2`. With the super-network's own cost, "
        f"that network costs {format_percent(costs[1]['of_super_network'])} of it alone, "
        f"{format_percent(costs[8]['of_super_network'])} when 8 share it, and "
        f"{format_percent(row['scratch_of_super_network'])} from scratch on as many tokens as the "
        f"super-network.{but}"
    )


def width(results: Results) -> str:
    return (
        f"{results.lost('w4')}. 12 layers: `w4` elastic minus inelastic "
        f"{results.elastic_cost('w4')}; elastic minus a network trained alone: `L9` "
        f"{results.specialist_gap('L9')}, `p8` {results.specialist_gap('p8')}"
    )


def slimmable_experts(results: Results) -> str:
    return (
        f"12 layers, elastic minus inelastic: whole network {results.elastic_cost('full')}; half "
        f"the width {results.elastic_cost('w4')}"
    )


def skipping(results: Results) -> str:
    full, t = results.sweep["full"], results.sweep["t0.5"]
    return (
        f"elastic-mini `t0.5`: {t['mean_experts']:.2f} of {full['mean_experts']:.0f} experts run, "
        f"{format_percent(t['flops_per_token'] / full['flops_per_token'])} of the FLOPs, "
        f"{t['delta_nats']:+.3f} ± {t['standard_error']:.3f}"
    )


def nothing(_: Results) -> str:
    return "not measured"


# --- what is published


@dataclass(frozen=True, slots=True)
class Claim:
    """One row.

    Attributes:
        published: in our words, with the figures of the source.
        reading: how the two sides compare, or why it is not reproducible here.
    """

    source: str
    published: str
    measured: Callable[[Results], str]
    reading: str


CLAIMS = (
    Claim(
        ERNIE,
        "k 8 -> 4 of 64 experts costs +0.002 nats",
        axis("k2", "k2"),
        "half of k on both sides; the scale is not reproducible here",
    ),
    Claim(
        ERNIE,
        "k 8 -> 2 costs +0.034",
        axis("k1", "k1"),
        "a quarter of k on both sides; here that is one expert, there two",
    ),
    Claim(
        ERNIE,
        "k 8 -> 1 costs +0.206",
        nothing,
        "not reproducible here: an eighth of k = 4 is less than one expert",
    ),
    Claim(
        ERNIE,
        "depth 16 -> 12 layers costs +0.196",
        axis("L36", "L9"),
        "three quarters of the depth on both sides",
    ),
    Claim(
        ERNIE,
        "pool 64 -> 32 experts costs +0.254",
        axis("p8", "p8"),
        "half of the pool on both sides; there training draws a pool's experts, here pools are "
        "nested",
    ),
    Claim(
        ERNIE,
        "at full budget, elastic training costs -0.004 (depth), +0.007 (pool), +0.024 (k)",
        full_budget,
        "there one axis per training, here all of them at once",
    ),
    Claim(
        ERNIE,
        "a quarter of k decodes more than 15 % faster, for 75.55 -> 74.43 points on benchmarks",
        quarter_of_k,
        "olmoe-0.9b has random weights. The gain is the share of the experts in what a step reads, "
        "and depends on model, batch and hardware. The points are not reproducible here: the model "
        "is not public, and ours answers no questions",
    ),
    Claim(
        ERNIE,
        "53.7 % of the active and 35.8 % of all parameters keep 75.17 of 75.55 points",
        nothing,
        "not reproducible here, for the same reason. That network was trained further after it was "
        "extracted, with the data and stages of the whole one",
    ),
    Claim(
        ERNIE_51,
        "about 6 % of the pre-training cost of comparable models; a third of the total and half of "
        "the active parameters of ERNIE 5.0, from which it was extracted",
        iteration,
        "not reproducible here: neither the compute nor the models compared with are published, "
        "nor whether ERNIE 5.0's own training is in the 6 %. Read it as the cost of one more "
        "network, given a super-network that is paid for",
    ),
    Claim(
        MATFORMER,
        "of an 850 M network with nested feed-forward widths, the parts from 582 M are better than "
        "networks trained alone",
        width,
        "half of each expert's width; dense networks there. Trained alone here: one of 9 layers "
        "and one of 8 experts, none of half the width",
    ),
    Claim(
        MOSE,
        "experts of several widths: at full width as good as an ordinary mixture of experts or "
        "better, and fewer FLOPs for a quality below it",
        slimmable_experts,
        "GPT-2 sizes on web text there. Here width is one axis of five, without a router that "
        "chooses it",
    ),
    Claim(
        NAEE,
        "Mixtral 8x7B, without training: skipping experts of small weight and removing some runs "
        "1.2 to 1.3 times as fast; without 2 of 8 experts, 2.9 points less",
        skipping,
        "our threshold is this rule for any k, and is trained for. Not reproducible here: Mixtral "
        "has 46.7 B parameters, and points need a model that answers",
    ),
    Claim(
        SLIMMABLE,
        "sandwich rule and in-place distillation: one image network of any width is as good as "
        "networks trained alone or better",
        nothing,
        "both rules are options of `elastic-moe train`; the runs compared here use neither. "
        "ImageNet is not reproducible here",
    ),
)


def page(results: Results) -> str:
    """The whole of CLAIMS.md."""
    training = read_training("elastic-mini")
    shape = training.shape
    science = results.science
    runs = NOT_YET if science is None else f"{format_si(science['tokens'])} tokens each"
    sizes = (
        f"{format_si(shape.total_params)} parameters, {shape.num_layers} layers, k "
        f"{shape.max_top_k} of {shape.num_experts} experts, "
        f"{format_si(training.tokens_before + training.tokens)} tokens"
    )
    head = f"""# Published claims, and what was measured here

`python -m benchmarks.claims` writes this page from [results](results); a test keeps it up to date.

- Figures with a sign are nats per token of held-out text, here the Python language reference: what
  a sub-network loses against the whole of the same network, unless said otherwise. ± is a standard
  error, or over seeds a standard deviation.
- *elastic-mini* is the bundled checkpoint: {sizes}.
- *12 layers* are trainings of one recipe, elastic, inelastic and of single sub-networks: {runs}.
- The ablation of ERNIE 5.0 has 3.2 B parameters, 64 experts, k 8, 250 B tokens. Across such scales
  the order and shape of the losses can be compared, their size cannot.
- Equal tokens do not make equal quality, and a cheaper network is no claim about a better one.

| source | published | measured here | how to read it |
|---|---|---|---|
"""
    rows = (
        f"| {c.source} | {c.published} | {c.measured(results)} | {c.reading} |\n" for c in CLAIMS
    )
    return head + "".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    text = page(Results())
    if not args.check:
        write_text(PAGE, text)
        return 0
    current = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text
    print("up to date" if current else f"{PAGE} is out of date: run python -m benchmarks.claims")
    return 0 if current else 1


if __name__ == "__main__":
    sys.exit(main())
