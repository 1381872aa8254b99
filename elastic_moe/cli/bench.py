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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic_moe.cli.arguments import add_execution, add_model_name, read_name

if TYPE_CHECKING:
    from elastic_moe.lab.bench.limits import Limits
    from elastic_moe.model.reference.transformer import ElasticTransformer

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
    import torch  # deferred: slow to load

    from elastic_moe.config import resolve_routing
    from elastic_moe.engine.running.loading import load_runner
    from elastic_moe.engine.running.reference import ReferenceRunner
    from elastic_moe.lab.bench.batch import Batch
    from elastic_moe.lab.bench.bench import bench, check_batch, describe_run
    from elastic_moe.lab.bench.kernels import load_kernel
    from elastic_moe.model.checkpoints.folder import checkpoint_name, find_checkpoint
    from elastic_moe.model.reference.loading import load_model

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    kernel = None
    if args.kernel is not None:
        sys.path.insert(0, str(Path.cwd()))
        kernel = load_kernel(args.kernel)
    folder = find_checkpoint(args.model, download=args.download)
    if kernel is not None:
        return _run_kernel(args, load_model(folder, dtype=args.dtype), kernel)
    # No engine: a checkpoint can be timed without a tokenizer.
    runner = load_runner(folder, backend=args.backend, dtype=args.dtype)
    subnet = resolve_routing(runner.config.shape, read_name(args.routing))
    dtype: Any = "bfloat16" if runner.dtype == torch.bfloat16 else "float32"
    ids, source = _ids(folder, runner.config.vocab_size)
    batch, error = Batch(runner), 0.0
    if runner.backend != "reference":
        reference = Batch(ReferenceRunner(load_model(folder, dtype=dtype)))
        error = check_batch(batch, reference, subnet, ids, dtype)
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
        "dtype": dtype,
        "ids": source,
        "error_to_reference": error,
        **result,
        **describe_run(batch),
    }
    if not args.json:
        _show(line)
    print(json.dumps(line))
    return 0


def _run_kernel(args: argparse.Namespace, model: ElasticTransformer, kernel: Any) -> int:
    from elastic_moe.lab.bench.kernels import bench_kernel
    from elastic_moe.lab.provenance import describe_provenance

    records = bench_kernel(model, kernel, quick=args.quick, progress=_progress)
    line = {
        "benchmark": "elastic-moe bench --kernel",
        "model": args.model,
        "kernel": args.kernel,
        "records": records,
        **describe_provenance(),
    }
    if not args.json:
        _show_kernel(line)
    print(json.dumps(line))
    return 0


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
        f"({limits.read_huge_bytes_per_second / 1e9:.1f} on huge pages), matrices "
        f"{limits.matmul_flops_per_second / 1e9:.0f} GFLOP/s in {limits.dtype}, "
        f"{limits.threads} threads"
    )


def _show(line: dict[str, Any]) -> None:
    """Print for a person."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, emoji=False)  # names are not ours
    level = f", level {line['level']}" if line["level"] else ""
    console.print(
        f"{line['model']} under {line['routing']}, {line['dtype']}, backend {line['backend']}"
        f"{level}"
    )
    table = Table(box=None, pad_edge=False)
    for heading in ("", "tokens/s", "touched", "of the limit"):
        table.add_column(heading, justify="right" if heading else "left")
    rows = (
        ("prefill", f"prefill of {line['prefill_tokens']} tokens", "share_of_matmul", "matrices"),
        ("decode", "decode, 1 sequence", "share_of_read", "memory"),
        ("decode16", "decode, 16 sequences", "share_of_read", "memory"),
    )
    for case, title, share, limit in rows:
        touched, part = line.get(f"{case}_touched_bytes"), line.get(f"{case}_{share}")
        table.add_row(
            title,
            f"{line[f'{case}_tokens_per_second']:,.1f}",
            "" if touched is None else f"{touched / 1e6:,.1f} MB",
            "" if part is None else f"{part:.0%} of {limit}",
        )
    console.print(table)


def _show_kernel(line: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, emoji=False)
    console.print(f"{line['kernel']} on the experts of {line['model']}, milliseconds")
    table = Table(box=None, pad_edge=False)
    columns = (
        "rows",
        "yours",
        "ours",
        "reference",
        "weights at the limit",
        "your error",
        "our error",
    )
    for heading in columns:
        table.add_column(heading, justify="right")
    for record in line["records"]:
        ms, errors = record["milliseconds"], record["errors"]
        limit = 1e3 * record["weight_bytes"] / record["limits"]["read_bytes_per_second"]
        table.add_row(
            str(record["rows"]),
            f"{ms['yours']:.3f}",
            "-" if ms["ours"] is None else f"{ms['ours']:.3f}",
            f"{ms['reference']:.3f}",
            f"{limit:.3f}",
            f"{errors['yours']:.2g}",
            f"{errors['ours']:.2g}" if "ours" in errors else "-",
        )
    console.print(table)
