"""Stream text that a model writes under a sub-network."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from elastic_moe.cli.arguments import add_model, add_ranking, add_routing, load_engine, read_routing
from elastic_moe.errors import RequestError

EXAMPLES = """examples:
  elastic-moe generate --prompt "The with statement is used to"
  elastic-moe generate --chat "What does textwrap.dedent do?" --routing L24-k2 --stats
  elastic-moe generate --prompt "def " --temperature 0.8 --seed 7 --routing w4
  elastic-moe generate --prompt "A cat: " --json-schema cat.schema.json --max-tokens 200
  echo "Once upon a time" | elastic-moe generate --max-tokens 100 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    add_model(parser)
    add_routing(parser)
    add_ranking(parser)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt", metavar="TEXT", help="text to continue (default: standard input)"
    )
    prompt.add_argument("--chat", metavar="TEXT", help="a question, put through the chat template")
    parser.add_argument("--max-tokens", type=int, default=64, help="default: %(default)s")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0: the likeliest token (default)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument("--sampling-top-k", type=int, default=0, help="0: all (default)")
    parser.add_argument("--min-p", type=float, default=0.0, help="default: %(default)s")
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X", help="default: %(default)s"
    )
    parser.add_argument(
        "--json-schema", metavar="FILE", type=Path, help="write JSON that this schema allows"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="may be repeated"
    )
    parser.add_argument("--ignore-eos", action="store_true", help="go on after an end token")
    parser.add_argument("--stats", action="store_true", help="print TTFT, TPOT and cost at the end")
    parser.add_argument("--json", action="store_true", help="print the finished completion as JSON")


def read_schema(path: Path) -> str:
    """The text of a schema file.

    Raises:
        RequestError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--json-schema {path} cannot be read: {error}") from error


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    from elastic_moe.engine import SamplingParams  # deferred: slow to load

    sampling = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.sampling_top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        json_schema=None if args.json_schema is None else read_schema(args.json_schema),
        seed=args.seed,
        stop=tuple(args.stop),
        ignore_eos=args.ignore_eos,
    )
    routing = read_routing(args)
    prompt = args.prompt
    if prompt is None and args.chat is None:
        prompt = sys.stdin.read()
    if not (prompt or args.chat):
        raise RequestError("the prompt is empty. Use --prompt, --chat or standard input.")
    engine = load_engine(args)
    if args.chat is not None:
        prompt = engine.tokenizer.encode_chat([{"role": "user", "content": args.chat}])
    completion = None
    for delta in engine.stream(prompt, routing, sampling):
        if not args.json:
            print(delta.text, end="", flush=True)
        completion = delta.completion
    if completion is None:
        raise RequestError("nothing was generated.")
    if args.json:
        print(json.dumps(asdict(completion), ensure_ascii=False))
        return 0
    print()
    if args.stats:
        usage, applied = completion.usage, completion.routing
        print(
            f"{applied.name}: {usage.prompt_tokens} + {usage.completion_tokens} tokens "
            f"({completion.finish_reason}), TTFT {usage.ttft_seconds * 1e3:.1f} ms, "
            f"TPOT {usage.tpot_seconds * 1e3:.2f} ms, {applied.depth} layers, "
            f"{applied.mean_experts:.2f} experts per token, "
            f"{applied.flops_per_token / 1e6:.1f} MFLOP per token",
            file=sys.stderr,
        )
    return 0
