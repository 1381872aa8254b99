"""Show a model's shape and elastic axes, a sub-network's cost, and what this install can run."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from elastic_moe.cli.arguments import add_model_name, add_routing, positive_integer, read_routing
from elastic_moe.routing.axes import AXES, DEPTH, TRAINED, Axis

NOT_TRAINED = "; not trained elastically"
EXAMPLES = """examples:
  elastic-moe info                                   the bundled model and this install
  elastic-moe info --routing L24-k2                  what half the depth and half the experts cost
  elastic-moe info path/to/checkpoint --json         for a program
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    add_model_name(parser)
    add_routing(parser)
    parser.add_argument(
        "--context",
        type=positive_integer,
        default=512,
        metavar="TOKENS",
        help="positions that a token attends to, for the cost (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    info = collect(args)
    if args.json:
        json.dump(info, sys.stdout, indent=1)
        print()
    else:
        show(info)
    return 0


def collect(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is shown, from config.json alone: no weights are read."""
    from elastic_moe_kernels import ops  # deferred: slow to load

    from elastic_moe.config import resolve_routing
    from elastic_moe.lab.provenance import describe_machine, describe_versions
    from elastic_moe.model.checkpoints.checkpoint import load_config
    from elastic_moe.model.checkpoints.folder import checkpoint_name, find_checkpoint

    folder = find_checkpoint(args.model, download=args.download)
    config = load_config(folder)
    shape = config.shape
    subnet = resolve_routing(shape, read_routing(args))
    full = resolve_routing(shape, None)
    flops = subnet.flops_per_token(args.context)
    return {
        "model": {
            "name": checkpoint_name(folder),
            "path": str(folder),
            "model_type": config.model_type,
            **{axis.size: axis.most(shape) for axis in AXES if axis.size is not None},
            "hidden_size": shape.hidden_size,
            "num_heads": shape.num_heads,
            "num_kv_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim,
            "vocab_size": shape.vocab_size,
            "max_positions": config.max_positions,
            "expert_hidden": shape.expert_hidden,
            "shared_experts": config.shared_experts,
            "shared_hidden": config.shared_hidden,
            "dense_layers": sorted(config.dense_layers),
            "dense_hidden": config.dense_hidden,
            "total_params": shape.total_params,
            "elastic_moe": config.elastic.to_json() if config.elastic else None,
        },
        "subnet": {
            "name": subnet.name,
            "fingerprint": subnet.fingerprint,
            str(DEPTH.members): list(subnet.active_layers),
            "active_params": subnet.active_params,
            "context": args.context,
            "flops_per_token": flops,
            "flops_of_full": flops / full.flops_per_token(args.context),
            "weight_bytes_per_token": subnet.weight_bytes_per_token(2),
            "kv_bytes_per_token": subnet.kv_bytes_per_token(2),
        },
        "backends": [
            {
                "name": backend.name,
                "available": backend.available,
                "level": backend.level,
                "levels": list(backend.levels),
                "detail": backend.detail,
            }
            for backend in ops.backends()
        ],
        "machine": describe_machine(),
        "versions": describe_versions(),
    }


def show(info: dict[str, Any]) -> None:
    """Print for a person."""
    from rich.console import Console
    from rich.table import Table

    from elastic_moe.lab.view.frontier import format_si

    console = Console(highlight=False, markup=False, emoji=False)  # names are not ours
    model, subnet = info["model"], info["subnet"]
    trained = (model["elastic_moe"] or {}).get("trained", {})

    experts, most, dense, shared = model["num_experts"], model["max_top_k"], "", ""
    if model["dense_layers"]:
        dense = f"; dense are {_runs(model['dense_layers'])}, of {model['dense_hidden']} channels"
    if model["shared_hidden"]:
        shared = f"; {model['shared_experts']} shared, of {model['shared_hidden']} in all"
    cost, share = format_si(subnet["flops_per_token"], "FLOP"), subnet["flops_of_full"]

    def table(title: str, rows: list[tuple[str, str]]) -> None:
        grid = Table.grid(padding=(0, 2))
        for left, right in rows:
            grid.add_row(f"  {left}", right)
        console.print(title, style="bold")
        console.print(grid)

    table(
        f"model {model['name']}",
        [
            (
                "architecture",
                f"{model['model_type']}, {format_si(model['total_params'])} parameters",
            ),
            ("layers", f"{model['num_layers']}, hidden size {model['hidden_size']}{dense}"),
            (
                "attention",
                f"{model['num_heads']} heads of {model['head_dim']}, {model['num_kv_heads']} KV",
            ),
            (
                "experts",
                f"{experts} of {model['expert_hidden']} channels, {most} per token{shared}",
            ),
            ("text", f"{model['vocab_size']} tokens, {model['max_positions']} positions"),
        ],
    )
    table(
        "elastic axes",
        [
            (f"{axis.letter}  {axis.wire}", _range(axis, model, trained.get(str(axis.trained))))
            for axis in TRAINED
        ],
    )
    table(
        f"sub-network {subnet['name']}",
        [
            ("layers", f"{len(subnet[str(DEPTH.members)])} of {model['num_layers']}"),
            ("active parameters", format_si(subnet["active_params"])),
            (
                "cost",
                f"{cost} per token at {subnet['context']} positions, {share:.1%} of full",
            ),
            (
                "weights read",
                f"{format_si(subnet['weight_bytes_per_token'], 'B')} per token in bf16",
            ),
            ("KV cache", f"{format_si(subnet['kv_bytes_per_token'], 'B')} per token in bf16"),
        ],
    )
    machine, versions = info["machine"], info["versions"]
    table(
        "this install",
        [
            *((f"backend {b['name']}", _backend(b)) for b in info["backends"]),
            (
                "machine",
                f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads",
            ),
            ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ],
    )


def _range(axis: Axis, model: dict[str, Any], drawn: list[float] | None) -> str:
    """'1 to 48; trained at 8-47, 48' style."""
    above = "above " if axis.above_zero else ""
    values = f"{above}{axis.least:g} to {axis.most(model):g}"
    if axis.kind == "real":
        reduced = [value for value in drawn or () if value != axis.whole(model)]
        return values + (f"; trained at {min(reduced)}-{max(reduced)}" if reduced else NOT_TRAINED)
    return values + (f"; trained at {_runs(drawn)}" if drawn else NOT_TRAINED)


def _runs(values: list[float]) -> str:
    """'8-47, 48' style: runs of consecutive integers joined."""
    numbers = sorted(int(value) for value in values)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _backend(backend: dict[str, Any]) -> str:
    if not backend["available"]:
        return f"no: {backend['detail']}"
    if not backend["levels"]:
        return f"yes, {backend['detail']}"
    return f"yes, level {backend['level']} of {', '.join(backend['levels'])}; {backend['detail']}"
