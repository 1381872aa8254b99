"""Time a model on this machine, beside what the machine gives at most.

Prefill of 512 tokens, decoding of one sequence after 64 tokens, and of 16 sequences; the results of
the fast backend are compared with the reference's before anything is timed. Ends with one line of
JSON. With --kernel, a function of yours runs the experts of one layer, beside ours:

  def experts(x, topk_ids, topk_weights, gate, up, down):
      # x (T, D), gate and up (E, F, D), down (E, D, F) in the model's dtype, topk_ids (T, K) int32,
      # topk_weights (T, K) float32; returns (T, D): for every token the sum over its experts of
      # weight * down(silu(gate x) * (up x))
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic_moe.cli.arguments import add_execution, add_model_name, read_name

if TYPE_CHECKING:
    from elastic_moe.lab.bench.limits import Limits

EXAMPLES = """examples:
  elastic-moe bench
  elastic-moe bench path/to/checkpoint --dtype bfloat16 --json
  elastic-moe bench --routing L24-k2 --quick
  elastic-moe bench path/to/checkpoint --kernel mykernels:experts
"""
TEXT_TOKENS = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    add_model_name(parser)
    add_execution(parser)
    parser.add_argument(
        "--routing",
        metavar="NAME",
        help="sub-network such as L36-k2-w6-t0.7-p8, or a JSON file of one (default: full)",
    )
    parser.add_argument(
        "--kernel",
        metavar="MODULE:FUNCTION",
        help="time this expert kernel on the model's first layer of experts instead",
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller limits")
    parser.add_argument("--json", action="store_true", help="print the line of JSON alone")


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    from elastic_moe_kernels import native

    from elastic_moe.config import resolve_routing
    from elastic_moe.engine.running.loading import load_runner
    from elastic_moe.engine.running.native import NativeRunner
    from elastic_moe.lab.bench.batch import Batch
    from elastic_moe.lab.bench.bench import bench, check_batch, describe_run
    from elastic_moe.model.checkpoints.folder import checkpoint_name, find_checkpoint

    if args.kernel is not None:
        return _run_kernel(args)
    folder = find_checkpoint(args.model, download=args.download)
    # No engine: a checkpoint can be timed without a tokenizer.
    runner = load_runner(folder, backend=args.backend, dtype=args.dtype)
    subnet = resolve_routing(runner.config.shape, read_name(args.routing))
    if args.threads is not None:
        runner.set_threads(args.threads)
    ids, source = _ids(folder, runner.config.vocab_size)
    batch, error = Batch(runner), 0.0
    if runner.backend != "reference":
        # The same numbers by other instructions: rounding apart, every level gives the same.
        others = [level for level in native.levels() if level != runner.level]
        level = others[0] if others else runner.level
        reference = Batch(NativeRunner(folder, runner.dtype, level=level))
        error = check_batch(batch, reference, subnet, ids, runner.dtype)
        del reference  # and its weights
    result = bench(
        batch,
        subnet,
        ids,
        max_positions=runner.config.max_positions,
        quick=args.quick,
        dtype=runner.dtype,
        started=None if args.json else _show_limits,
        progress=_progress,
    )
    line = {
        "benchmark": "elastic-moe bench",
        "model": checkpoint_name(folder),
        "routing": subnet.name,
        "dtype": runner.dtype,
        "ids": source,
        "error_to_reference": error,
        **result,
        **describe_run(batch),
    }
    _print(line, None if args.json else _show)
    return 0


def _run_kernel(args: argparse.Namespace) -> int:
    from elastic_moe.errors import require_torch

    require_torch("--kernel")
    import torch  # deferred: slow to load

    from elastic_moe.lab.bench.kernels import bench_kernel, load_kernel
    from elastic_moe.lab.load import LoadMonitor
    from elastic_moe.lab.provenance import describe_provenance
    from elastic_moe.model.checkpoints.folder import find_checkpoint
    from elastic_moe.model.reference.loading import load_model

    sys.path.insert(0, str(Path.cwd()))
    kernel = load_kernel(args.kernel)
    model = load_model(find_checkpoint(args.model, download=args.download), dtype=args.dtype)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    load = LoadMonitor()
    records = bench_kernel(
        model, kernel, quick=args.quick, threads=args.threads, load=load, progress=_progress
    )
    provenance = describe_provenance(args.threads)
    line = {
        "benchmark": "elastic-moe bench --kernel",
        "model": args.model,
        "kernel": args.kernel,
        "records": records,
        "load": load.describe(threads=provenance["machine"]["threads"]),
        **provenance,
    }
    _print(line, None if args.json else _show_kernel)
    return 0


def _print(line: dict[str, Any], show: Callable[[dict[str, Any]], None] | None) -> None:
    """Print a result: for a person if there is a way to, then as JSON. Warnings go to stderr."""
    from elastic_moe.lab.load import busy_warning

    if show is not None:
        show(line)
    if warning := busy_warning(line):
        print(warning, file=sys.stderr)
    print(json.dumps(line))


def _ids(folder: Path, vocab_size: int) -> tuple[list[int], str]:
    """Token ids to run on, and where they are from: text, so that routing is that of text."""
    from elastic_moe.errors import CheckpointError, CorpusError
    from elastic_moe.lab.bench.bench import random_ids
    from elastic_moe.lab.sweeps.text import language_reference
    from elastic_moe.model.text.tokenizer import Tokenizer

    if (folder / "tokenizer.json").is_file():
        try:
            corpus = language_reference()
            ids = Tokenizer(folder).encode(corpus.text[: 8 * TEXT_TOKENS])
            return [token for token in ids if token < vocab_size][:TEXT_TOKENS], corpus.name
        except (CheckpointError, CorpusError) as error:
            print(f"ids are random: {error}", file=sys.stderr)
    return random_ids(TEXT_TOKENS, vocab_size), "random"


def _progress(done: int, total: int) -> None:
    print(f"\rround {done} of {total}", end="", file=sys.stderr, flush=True)
    if done == total or not sys.stderr.isatty():
        print(file=sys.stderr)


def _show_limits(limits: Limits) -> None:
    print(
        f"limits: memory {limits.read_bytes_per_second / 1e9:.1f} GB/s "
        f"({limits.read_huge_bytes_per_second / 1e9:.1f} on huge pages), multiply-adds "
        f"{limits.matmul_flops_per_second / 1e9:.0f} GFLOP/s in {limits.dtype}, "
        f"{limits.threads} threads"
    )


def _show(line: dict[str, Any]) -> None:
    """Print for a person."""
    from elastic_moe.cli.tables import Column, make_console, print_table
    from elastic_moe.lab.view.frontier import format_range

    console = make_console()
    level = f", level {line['level']}" if line["level"] else ""
    console.print(
        f"{line['model']} under {line['routing']}, {line['dtype']}, backend {line['backend']}"
        f"{level}"
    )
    rows = (
        ("prefill", f"prefill of {line['prefill_tokens']} tokens", "share_of_matmul", "matrices"),
        ("decode", "decode, 1 sequence", "share_of_read", "memory"),
        ("decode16", "decode, 16 sequences", "share_of_read", "memory"),
    )
    touched, shares = [], []
    for case, _, share, limit in rows:
        size, part = line.get(f"{case}_touched_bytes"), line.get(f"{case}_{share}")
        touched.append("" if size is None else f"{size / 1e6:,.1f} MB")
        shares.append("" if part is None else f"{part:.0%} of {limit}")
    speeds = [f"{line[f'{case}_tokens_per_second']:,.1f}" for case, *_ in rows]
    columns = [
        Column("", [title for _, title, *_ in rows], 9),
        Column("tokens/s", speeds, 8),
        Column("min-max", [format_range(line, case) for case, *_ in rows], 7),
        Column("touched", touched, 5),
        Column("of the limit", shares, 6),
    ]
    print_table(console, columns, box=None)


def _show_kernel(line: dict[str, Any]) -> None:
    from elastic_moe.cli.tables import Column, make_console, print_table

    records = line["records"]

    def times(name: str, end: str = "") -> list[str]:
        values = [record[f"milliseconds{end}"][name] for record in records]
        return ["-" if value is None else f"{value:.3f}" for value in values]

    def errors(name: str) -> list[str]:
        return [f"{r['errors'][name]:.2g}" if name in r["errors"] else "-" for r in records]

    def span(name: str) -> list[str]:
        return [
            "-".join(ends) for ends in zip(times(name, "_min"), times(name, "_max"), strict=True)
        ]

    limits = [1e3 * r["weight_bytes"] / r["limits"]["read_bytes_per_second"] for r in records]
    console = make_console()
    console.print(f"{line['kernel']} on the experts of {line['model']}, milliseconds")
    columns = [
        Column("rows", [str(record["rows"]) for record in records], 9),
        Column("yours", times("yours"), 8),
        Column("min-max", span("yours"), 4),
        Column("ours", times("ours"), 8),
        Column("reference", times("reference"), 6),
        Column("weights at the limit", [f"{limit:.3f}" for limit in limits], 5),
        Column("your error", errors("yours"), 7),
        Column("our error", errors("ours"), 3),
    ]
    print_table(console, columns, box=None)
