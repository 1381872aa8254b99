"""Write a sub-network as a standard checkpoint of its own.

Layers, experts and channels are really cut; transformers, vLLM and llama.cpp run the result. What a
standard configuration cannot say (a threshold, values that differ from layer to layer) is an error.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from elastic_moe.cli.arguments import add_download, add_ranking, read_routing
from elastic_moe.sizes import parse_size

EXAMPLES = """examples:
  elastic-moe extract elastic-mini L24-k2-w4 --out mini-L24
  elastic-moe extract path/to/checkpoint p32 --out half-the-experts
  elastic-moe extract path/to/checkpoint w4 --rank-channels notes.txt --out half-the-width
  elastic-moe extract path/to/checkpoint --routing-config pool.json --pool-as-bias --out out
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a bundled model, a Hugging Face folder, or an id in the Hugging Face cache",
    )
    add_download(parser)
    parser.add_argument(
        "routing",
        metavar="NAME",
        nargs="?",
        help="the sub-network, such as L36-k2-w6-p8, or a JSON file of one",
    )
    parser.add_argument(
        "--routing-config",
        metavar="FILE",
        type=Path,
        help="instead of NAME: JSON of an ElasticRoutingConfig; an absent key is full",
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="a new folder for the checkpoint"
    )
    parser.add_argument(
        "--pool-as-bias",
        action="store_true",
        help="keep all experts and shut those beyond the pool out by the router's selection bias "
        "(ERNIE 4.5)",
    )
    add_ranking(parser)
    parser.add_argument(
        "--max-shard-size",
        type=_size,
        default="5GB",
        metavar="SIZE",
        help="split weights beyond it into several files (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    if (args.routing is None) == (args.routing_config is None):
        from elastic_moe.errors import RoutingError

        raise RoutingError("name the sub-network: NAME or --routing-config FILE, one of the two.")
    routing: Any = read_routing(args)
    from elastic_moe.model.checkpoints.checkpoint import load_config  # deferred: slow to load
    from elastic_moe.model.checkpoints.extract import extract
    from elastic_moe.model.checkpoints.folder import find_checkpoint

    folder = find_checkpoint(args.model, download=args.download)
    order = None
    if args.rank_channels is not None:
        from elastic_moe.engine import Engine
        from elastic_moe.lab.sweeps.text import read_corpus

        with Engine.from_pretrained(folder) as engine:
            order = engine.rank_channels(read_corpus(args.rank_channels).text)
    out = extract(
        folder,
        routing,
        args.out,
        pool_as_bias=args.pool_as_bias,
        channel_order=order,
        max_shard_bytes=args.max_shard_size,
    )
    config = load_config(out)
    weight_bytes = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    written = {
        "out": str(out),
        "subnet": config.elastic.subnet if config.elastic else None,
        "parent": config.elastic.parent if config.elastic else None,
        "num_layers": config.num_layers,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.max_top_k,
        "expert_hidden": config.expert_hidden,
        "total_params": config.shape.total_params,
        "weight_bytes": weight_bytes,
    }
    if args.json:
        print(json.dumps(written))
        return 0
    print(
        f"{written['subnet']} of {args.model} is in {out}: {config.num_layers} layers, "
        f"{config.num_experts} experts of {config.expert_hidden} channels, "
        f"{config.max_top_k} per token, {config.shape.total_params:,} parameters, "
        f"{weight_bytes / 1e6:,.1f} MB"
    )
    return 0


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
