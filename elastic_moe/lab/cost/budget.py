"""The compute ledger: what a super-network costs, and what each network that comes out of it costs.

Everything is counted in floating-point operations (FLOP), two per multiply-add. With

    f(s, c)  operations of one token forward through sub-network s at c positions of context:
             matrices, attention, norms, router and head; not the embedding look-up, softmax, RoPE
             and activations (`Subnet.flops_per_token`)
    3 f      forward and backward; what the optimiser does is not counted
    c        half the length of a training sequence, which is the mean over its tokens

and a threshold that counts as if it dropped nothing, the figures are:

    super-network   F = sum over steps of 3 f(s, c) tokens over the networks s that the step
                    trains and the tokens that each runs, and f of one that only runs, to distil
                    from
    inelastic       I = sum over steps of 3 f(all layers of that step, c) tokens_step; F / I - 1 is
                    what elastic training costs, or saves where it is negative
    refinement      R = 3 f(s, c of the last stage) tokens: s trained on, alone; of one that was
                    really done, what it took
    from scratch    S = tokens x the mean over the run's tokens of 3 f(s, c), where s grows as the
                    super-network grew: a stage runs those layers of s that it has. Of the full
                    network on the same tokens this is I. Ungrown: all of s from the first step on
    per network     F / n + R when n networks share the super-network
    break-even      the smallest n with F + n R < n S; none where R >= S

The trainings that led to the weights are the super-network's, each counted once, up to those at the
end that trained a sub-network which had been extracted, or one proper sub-network alone in every
step: they are the refinement of it.

Shares are of F ("of an existing super-network"), of F / n + R ("of the total") or of S. All of this
is compute: equal tokens do not make equal quality.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from elastic_moe.errors import OptionError
from elastic_moe.lab.cost.lineage import join_trainings, split_trainings
from elastic_moe.lab.cost.training import Training, stages_done
from elastic_moe.routing import ModelShape, Subnet, resolve, shorten
from elastic_moe.routing.subnet import INACTIVE
from elastic_moe.train.ledger import replay
from elastic_moe.train.step.plan import Stage, TrainingPlan

FORWARD_AND_BACKWARD = 3  # in units of a forward pass
MOST_NETWORKS, MOST_TOKENS = 10**9, 10**27  # far beyond anybody's, and floats hold what they cost


@dataclass(frozen=True, slots=True)
class Network:
    """A network that comes out of the super-network.

    Attributes:
        tokens: it is refined on, alone; 0 for one that is used as it was extracted.
        refinement_flops: R.
        scratch_flops: S.
        ungrown_scratch_flops: S, if it ran all of its layers in every stage.
        done: by these trainings, where the refinement is no plan; () where it is.
    """

    name: str
    tokens: int
    flops_per_token: float
    refinement_flops: float
    scratch_flops: float
    ungrown_scratch_flops: float
    done: tuple[Training, ...] = ()


def training_flops_per_token(subnet: Subnet, length: int) -> float:
    """3 f(s, c): forward and backward, in sequences of `length` tokens."""
    return FORWARD_AND_BACKWARD * subnet.flops_per_token(length // 2)


def inelastic_flops(plan: TrainingPlan, shape: ModelShape, steps: int) -> float:
    """I: the same steps, each with all layers that the network had grown to and nothing reduced."""
    return sum(
        tokens
        * training_flops_per_token(
            resolve(shape, active_layers=stage.grown(shape.num_layers)), stage.length
        )
        for stage, tokens in stages_done(plan, steps)
    )


def distillation_flops(plan: TrainingPlan, shape: ModelShape, steps: int) -> float:
    """What distillation adds: forward passes of a network that the step does not train."""
    if not plan.distill:
        return 0.0
    without = replay(replace(plan, distill=0.0), shape, steps).flops
    return replay(plan, shape, steps).flops - without


def scratch_flops(plan: TrainingPlan, steps: int, subnet: Subnet, *, grows: bool = True) -> float:
    """S on the tokens of the plan's first `steps` steps: `subnet` alone, from random weights.

    Args:
        grows: as the plan's network does; False: all of its layers run from the first step on.
    """
    return sum(
        tokens * training_flops_per_token(_grown(subnet, stage) if grows else subnet, stage.length)
        for stage, tokens in stages_done(plan, steps)
    )


def _grown(subnet: Subnet, stage: Stage) -> Subnet:
    """What a training of the sub-network alone runs in a stage: those of its layers that are there.

    One layer at least, where none of them is.
    """
    shape, grown = subnet.shape, stage.grown(subnet.shape.num_layers)
    kept = set(grown).intersection(subnet.active_layers) or {subnet.active_layers[0]}
    cut = (layer if i in kept else INACTIVE for i, layer in enumerate(subnet.layers))
    return Subnet(shape, tuple(cut))


def break_even(super_flops: float, refinement: float, scratch: float) -> int | None:
    """The smallest n with F + n R < n S; None where no n has it.

    Exact: floats are compared as the fractions that they are.
    """
    gain = Fraction(scratch) - Fraction(refinement)
    return math.floor(Fraction(super_flops) / gain) + 1 if gain > 0 else None


# --- the ledger


def usual_subnets(shape: ModelShape) -> list[Subnet]:
    """What one would extract first: quarters of the depth, half of the experts, half of both."""
    L, k = shape.num_layers, max(1, shape.max_top_k // 2)
    half = max(1, L // 2)
    wanted = [
        *(resolve(shape, depth=max(1, L * quarters // 4)) for quarters in (3, 2, 1)),
        resolve(shape, top_k=k),
        resolve(shape, depth=half, top_k=k),
    ]
    different = {subnet.name: subnet for subnet in wanted}
    different.pop("full", None)
    return list(different.values()) or [resolve(shape)]


def networks_up_to(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    powers = [1 << i for i in range(most.bit_length())]
    return powers if powers[-1] == most else [*powers, most]


def make_budget(
    training: Training,
    refinements: Sequence[tuple[Subnet, int]] = (),
    *,
    earlier: Sequence[Training] = (),
    networks: int = 8,
    scratch_tokens: int | None = None,
) -> dict[str, Any]:
    """The ledger as JSON; the module says what each figure is.

    Args:
        refinements: sub-networks and the tokens that each is refined on; none: the usual ones,
            used as they are extracted. One that was really done comes first, whatever is asked.
        earlier: trainings that this one went on from, the first one first; they count too, as
            those do that its manifest records, each once.
        networks: the largest number of networks that share the super-network.
        scratch_tokens: of a training from scratch; None for those of the super-network.

    Returns:
        FLOPs as numbers, shares as ratios (1 is 100 %).

    Raises:
        OptionError: a number is out of its range, or as `join_trainings`.
    """
    for field, value, least, most in (
        ("networks", networks, 1, MOST_NETWORKS),
        ("scratch_tokens", scratch_tokens, 1, MOST_TOKENS),
        *((f"tokens to refine {s.name} on", tokens, 0, MOST_TOKENS) for s, tokens in refinements),
    ):
        if value is not None and not least <= value <= most:
            raise OptionError(f"{field} must be in [{least}, {most:,}], got {shorten(value)}.")
    parts = join_trainings(training, earlier)
    supers, done, own = split_trainings(parts)
    shape = supers[-1].shape
    length = stages_done(supers[-1].plan, supers[-1].steps)[-1][0].length
    tokens_done = sum(part.tokens for part in supers)
    super_network = _describe_super_network(supers)
    flops = super_network["flops"]
    share = 1.0 if scratch_tokens is None else scratch_tokens / tokens_done

    def network(subnet: Subnet, tokens: int, done: Sequence[Training] = ()) -> Network:
        planned = training_flops_per_token(subnet, length) * tokens
        scratch, ungrown = (
            share * sum(scratch_flops(p.plan, p.steps, subnet, grows=grows) for p in supers)
            for grows in (True, False)
        )
        return Network(
            name=subnet.name,
            tokens=tokens,
            flops_per_token=subnet.flops_per_token(length // 2),
            refinement_flops=sum(part.flops for part in done) if done else planned,
            scratch_flops=scratch,
            ungrown_scratch_flops=ungrown,
            done=tuple(done),
        )

    asked = refinements or [(subnet, 0) for subnet in usual_subnets(shape) if subnet != own]
    rows = [network(subnet, tokens) for subnet, tokens in asked]
    if own is not None:
        rows.insert(0, network(own, sum(part.tokens for part in done), done))
    counts = networks_up_to(networks)
    of_full = resolve(shape).flops_per_token(length // 2)
    refined = sum(row.refinement_flops for row in rows)
    alone = sum(row.scratch_flops for row in rows)
    return {
        "trainings": [
            {
                "name": part.name or f"training {i} of {len(parts)}",
                "path": str(part.path),
                "kind": part.kind,
                "part": "super-network" if i <= len(supers) else "refinement",
                "extracted": part.shape != shape,
                "alone": None if part.alone is None else part.alone.name,
                "steps": part.steps,
                "planned_steps": part.plan.total_steps,
                "tokens": part.tokens,
                "flops": part.flops,
            }
            for i, part in enumerate(parts, start=1)
        ],
        "super_network": super_network,
        "context_tokens": length // 2,
        "scratch_tokens": tokens_done if scratch_tokens is None else scratch_tokens,
        "networks": [
            {
                "name": row.name,
                "flops_per_token": row.flops_per_token,
                "of_full_per_token": row.flops_per_token / of_full,
                "refinement_tokens": row.tokens,
                "refinement_done": bool(row.done),
                "refinement_measured": _measured(row.done),
                "ungrown_scratch_flops": row.ungrown_scratch_flops,
                **_costs(flops, row.refinement_flops, row.scratch_flops, counts),
            }
            for row in rows
        ],
        "mean": _costs(flops, refined / len(rows), alone / len(rows), counts),
        "together": {
            "networks": len(rows),
            "flops": flops + refined,
            "scratch_flops": alone,
            "of_scratch": (flops + refined) / alone,
        },
    }


def _describe_super_network(parts: Sequence[Training]) -> dict[str, Any]:
    """The sum of its trainings, and what is not in it: what the first one began with."""
    first = parts[0]
    flops = sum(part.flops for part in parts)
    inelastic = sum(inelastic_flops(part.plan, part.shape, part.steps) for part in parts)
    last, _ = stages_done(parts[-1].plan, parts[-1].steps)[-1]
    uncounted = {"parent": first.parent, "tokens": first.tokens_before}
    return {
        "steps": sum(part.steps for part in parts),
        "tokens": sum(part.tokens for part in parts),
        "flops": flops,
        "inelastic_flops": inelastic,
        "of_inelastic": flops / inelastic,
        "distillation_flops": sum(
            distillation_flops(part.plan, part.shape, part.steps) for part in parts
        ),
        "layers": parts[-1].shape.num_layers,
        "grown_layers": last.layers,
        "measured": _measured(parts),
        "uncounted": None if first.parent is None else uncounted,
        "alone": None if parts[-1].alone is None else parts[-1].alone.name,
    }


def _measured(parts: Sequence[Training]) -> dict[str, Any] | None:
    """The time of trainings; None where no step's is known, and no rate without that of each."""
    seconds = [part.seconds for part in parts if part.seconds is not None]
    if not seconds:
        return None
    timed, total = sum(part.timed_steps for part in parts), math.fsum(seconds)
    every = timed == sum(part.steps for part in parts) and total > 0
    return {
        "seconds": total,
        "timed_steps": timed,
        "flops_per_second": sum(part.flops for part in parts) / total if every else None,
    }


def _costs(
    super_flops: float, refinement: float, scratch: float, counts: Sequence[int]
) -> dict[str, Any]:
    """What one network costs, and n of them that cost the same."""
    shared = [(n, super_flops / n + refinement) for n in counts]
    return {
        "refinement_flops": refinement,
        "refinement_of_super_network": refinement / super_flops,
        "refinement_of_scratch": refinement / scratch,
        "scratch_flops": scratch,
        "scratch_of_super_network": scratch / super_flops,
        "break_even_networks": break_even(super_flops, refinement, scratch),
        "shared": [
            {
                "networks": n,
                "flops_per_network": cost,
                "of_super_network": cost / super_flops,
                "of_scratch": cost / scratch,
                "refinement_of_total": refinement / cost,
            }
            for n, cost in shared
        ],
    }
