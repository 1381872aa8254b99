"""What is published about elastic mixtures of experts, beside what was measured here.

python -m experiments.claims.page            writes docs/claims.md
python -m experiments.claims.page --check    exits 1 if the page is not up to date

The published side is data of this file and of the science's summary, each with its source. The
measured side is read from benchmarks/results and from the bundled checkpoint's manifest; nothing of
it stands here, and what was not measured on the bundled weights is refused.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from elastic_moe.errors import ElasticMoEError
from elastic_moe.files import write_text
from elastic_moe.lab.cost.budget import make_budget
from elastic_moe.lab.cost.training import read_training
from elastic_moe.lab.view.frontier import format_percent, format_si
from elastic_moe.routing import parse_name
from experiments.claims.results import MODEL, NOT_YET, RESULTS, Results
from experiments.science.summary import PUBLISHED, PUBLISHED_COST_AT_FULL

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "claims.md"

ERNIE = "ERNIE 5.0, [2602.04705](https://arxiv.org/abs/2602.04705)"
ERNIE_51 = "ERNIE 5.1, [announcement](https://ernie.baidu.com/blog/posts/ernie-5.1-0508-release/)"
MATFORMER = "MatFormer, [2310.07707](https://arxiv.org/abs/2310.07707)"
MOSE = "MoSE, [2602.06154](https://arxiv.org/abs/2602.06154)"
NAEE = "NAEE, [2402.14800](https://arxiv.org/abs/2402.14800)"
SLIMMABLE = "Universally slimmable networks, [1903.05134](https://arxiv.org/abs/1903.05134)"


# --- what is measured, row by row


def axis(point: str, science: str) -> Callable[[Results], str]:
    """The loss of one reduced network, of the bundled checkpoint and of the 12-layer runs."""
    return lambda results: f"{results.lost(point)}. {results.science_lost(science)}"


def full_budget(results: Results) -> str:
    return (
        f"12 layers, all axes at once, whole network: {results.elastic_cost('full')}, frugal: "
        f"{results.frugal_cost('full')}; one network a step, as there: {results.drawn_cost('full')}"
    )


def quarter_of_k(results: Results) -> str:
    record = results.peers["mix k"]
    rounds = [r["other"] for r in record["rounds"]]
    ratio = statistics.median(r["full seconds"] / r["k2 seconds"] for r in rounds)
    return (
        f"olmoe-0.9b, 16 sequences, {record['machine']['cores']} CPU cores: k 8 -> 2 decodes "
        f"{format_percent(ratio - 1)} faster"
    )


def iteration(_: Results) -> str:
    training = read_training(MODEL)
    chosen = parse_name(training.shape, "L24-k2")
    budget = make_budget(training, [(chosen, 1)])
    row, uncounted = budget["networks"][-1], budget["super_network"]["uncounted"]
    of_super, of_scratch = (
        format_si(round(ITERATION / row[f"refinement_of_{base}"]))
        for base in ("super_network", "scratch")
    )
    grown, ungrown = row["scratch_flops"], row["ungrown_scratch_flops"]
    growing = ""
    if ungrown > grown:
        growing = (
            f" S grows in depth as the super-network did; with all its layers from the first step "
            f"on it is {format_si(ungrown, 'FLOP')}, and {format_percent(ITERATION)} of it "
            f"{format_si(round(ITERATION * ungrown / row['refinement_flops']))}."
        )
    but = f" Not counted: what {uncounted['parent']} had cost" if uncounted else ""
    return (
        f"`elastic-moe budget`, arithmetic and no result. A network such as elastic-mini's "
        f"`{chosen.name}` from scratch, on as many tokens as the super-network: S, "
        f"{format_si(row['scratch_flops'], 'FLOP')}; the super-network: F, "
        f"{format_si(budget['super_network']['flops'], 'FLOP')}. {format_percent(ITERATION)} of S "
        f"is {of_scratch} tokens of refining that network, {format_percent(ITERATION)} of F is "
        f"{of_super}; either comes on top of F.{growing}{but}"
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
        f"{results.lost('p8')}, half of the experts. `t0.5`{results.swept()}: "
        f"{t['mean_experts']:.2f} of {full['mean_experts']:.0f} experts run, "
        f"{format_percent(t['flops_per_token'] / full['flops_per_token'], 1)} of the FLOPs, "
        f"{t['delta_nats']:+.3f} ± {t['standard_error']:.3f}"
    )


def nothing(_: Results) -> str:
    return "not measured"


# --- what is published

ITERATION = 0.06  # of the pre-training cost of comparable models: ERNIE 5.1
_DEPTH, _POOL, _TOP_K = (f"{cost:+.3f}" for cost in PUBLISHED_COST_AT_FULL)


def ablation(point: str) -> str:
    """What one axis cost in the ablation of ERNIE 5.0: the counterpart of a point measured here."""
    return f"{PUBLISHED[point]['what']} costs {PUBLISHED[point]['lost']:+.3f}"


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
        ablation("k2"),
        axis("k2", "k2"),
        "half of k on both sides; the scale is not reproducible here",
    ),
    Claim(
        ERNIE,
        ablation("k1"),
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
        ablation("L9"),
        axis("L36", "L9"),
        "three quarters of the depth on both sides",
    ),
    Claim(
        ERNIE,
        ablation("p8"),
        axis("p8", "p8"),
        "half of the pool on both sides; there training draws a pool's experts, here pools are "
        "nested",
    ),
    Claim(
        ERNIE,
        f"at full budget, elastic training costs {_DEPTH} (depth), {_POOL} (pool), {_TOP_K} (k)",
        full_budget,
        "there one axis per training, drawn for the whole batch; here all of them at once, on a "
        "quarter of every batch, frugal on an eighth, and the full network on the rest",
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
        f"about {format_percent(ITERATION)} of the pre-training cost of comparable models; a "
        "third of the total and half of the active parameters of ERNIE 5.0, from which it was "
        "extracted",
        iteration,
        "not reproducible here: neither the compute nor the base of the share is published. "
        "'Comparable models' is nearest to S, a share of an existing super-network would be of F. "
        "Nor is it said whether ERNIE 5.0's own training is in it. Read it as the cost of one more "
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
        "Mixtral 8x7B, without training: without 2 of 8 experts 1.20 times as fast and 2.9 points "
        "less, without 4 of 8 1.27 times and 7.1 points; 1.3 times needs skipping of experts of "
        "small weight as well",
        skipping,
        "there k is 2, each layer skips by a ratio of its own, the median of a calibration, and "
        "what to remove is searched for; here one fixed t holds for all layers and any k, "
        "pools are nested, and both are trained for. Not reproducible here: Mixtral has "
        "46.7 B parameters, and points need a model that answers",
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
    training = read_training(MODEL)
    shape = training.shape
    science = results.science
    runs = NOT_YET if science is None else f"{format_si(science['tokens'])} tokens each"
    sizes = (
        f"{format_si(shape.total_params)} parameters, {shape.num_layers} layers, k "
        f"{shape.max_top_k} of {shape.num_experts} experts, "
        f"{format_si(training.tokens_before + training.tokens)} tokens of training"
    )
    unless = ", unless a row gives another number" if results.swept() else ""
    head = f"""# Published claims, and what was measured here

`python -m experiments.claims.page` writes this page from [results](../benchmarks/results);
a test keeps it up to date.

- Figures with a sign are nats per token of held-out text (a nat is 1.44 bits), here the Python
  language reference: the loss that a sub-network adds to that of the full network, unless said
  otherwise. ± is a standard error, or over seeds a standard deviation.
- *elastic-mini* is the bundled checkpoint:
  {sizes}; its figures are over
  {results.scored_tokens:,} scored tokens{unless}.
- *12 layers* are trainings of one recipe, elastic, inelastic and of
  single sub-networks: {runs}.
  The elastic ones run the full network on three quarters of every step's text, *frugal* ones on
  seven eighths, and a drawn one on the rest. *One network a step* is the default of `elastic-moe
  train`: the one that is drawn, as ERNIE 5.0 draws it. For differences between trainings of several
  seeds, ± is the difference that two seeds would show.
- The ablation of ERNIE 5.0 has 3.2 B parameters, 64 experts, k 8, 250 B tokens. Order and shape of
  the losses compare across such scales, their size does not.
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
    try:
        text = page(Results(RESULTS))
    except (ElasticMoEError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    if not args.check:
        write_text(PAGE, text)
        return 0
    current = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text
    print(
        "up to date" if current else f"{PAGE} is out of date: run python -m experiments.claims.page"
    )
    return 0 if current else 1


if __name__ == "__main__":
    sys.exit(main())
