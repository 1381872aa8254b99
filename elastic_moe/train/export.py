"""From a training run to a checkpoint folder: `python -m elastic_moe.train.export RUN FOLDER`.

Writes the weights in bf16, config.json with the `elastic_moe` block, the tokenizer and its chat
template, and `manifest.json`: every file that was trained on, the plan, and the draws per axis.

Examples:
  python -m elastic_moe.train.export runs/mini checkpoints/mini
  elastic-moe generate checkpoints/mini --prompt "The with statement"
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from elastic_moe.errors import ElasticMoEError, TrainingError
from elastic_moe.files import write_text
from elastic_moe.model.config import ElasticBlock, ModelConfig
from elastic_moe.model.families import write_config
from elastic_moe.model.saving import save_checkpoint
from elastic_moe.train.checkpoint import check_same_run, load_state, model_to_json
from elastic_moe.train.data import TOKENIZER, read_manifest
from elastic_moe.train.ledger import replay
from elastic_moe.train.mini import ELASTIC_MINI
from elastic_moe.train.plan import TrainingPlan
from elastic_moe.train.tokens import BOS, END, IM_END, PAD, SPECIAL_TOKENS, special_id

# Of tools it tells names, parameters' names and descriptions: whole schemas of a large application
# would fill the context.
CHAT_TEMPLATE = (
    "{%- if tools %}"
    "{{- '<|im_start|>system\\n' }}"
    "{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] + '\\n\\n' }}{%- endif %}"
    "{{- 'Functions:\\n' }}"
    "{%- for tool in tools %}"
    "{%- set own = tool['function'] %}"
    "{{- '- ' + own['name'] + '(' + (own['parameters'] or {})['properties'] | join(', ') + '): ' }}"
    "{{- own['description'] + '\\n' }}"
    "{%- endfor %}"
    '{{- \'A call: <tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call><|im_end|>\\n\' }}'
    "{%- endif %}"
    "{%- for message in messages %}"
    "{%- if not (tools and loop.first and message['role'] == 'system') %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
    "{%- for call in message['tool_calls'] or [] %}"
    "{%- set own = call['function'] %}"
    "{{- '\\n' if message['content'] or not loop.first }}"
    "{{- '<tool_call>\\n' + {'name': own['name'], 'arguments': own['arguments']} | tojson }}"
    "{{- '\\n</tool_call>' }}"
    "{%- endfor %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def export(run: Path, folder: Path, config: ModelConfig = ELASTIC_MINI) -> None:
    """Write the checkpoint folder of the run's latest state.

    Raises:
        TrainingError: there is no state, it is of another model or other data, or its network has
            not grown to all layers yet: those that never ran would pass for trained ones.
    """
    state = run / "state.safetensors"
    if not state.is_file():
        raise TrainingError(f"{state} is missing. Name the folder that --out named in training.")
    tensors, progress = load_state(state)
    weights = {
        name.removeprefix("model."): tensor
        for name, tensor in tensors.items()
        if name.startswith("model.")
    }
    corpus, source = read_manifest(run / "data")
    data = {**progress["data"], "source": source}
    check_same_run(state, progress, {"model": model_to_json(config), "data": data})
    plan = TrainingPlan.from_json(progress["plan"])
    ledger = replay(plan, config.shape, progress["step"])
    if not ledger.trained:
        raise TrainingError(
            f"{state} is at step {progress['step']} of {plan.total_steps}, and no step has run "
            f"with all {config.num_layers} layers. Train on, with a last stage of "
            f"{config.num_layers} layers."
        )
    manifest = {
        "corpus": corpus,
        "training": {
            "plan": plan.to_json(),
            "steps": ledger.steps,
            "full_steps": ledger.full_steps,
            "tokens": ledger.tokens,
            "flops": ledger.flops,
            "draws": ledger.draws_to_json(),
        },
    }
    text = json.dumps(manifest, indent=1) + "\n"
    files = json.dumps(corpus["files"], sort_keys=True)
    elastic = ElasticBlock(
        width_granules=config.shape.width_granules,
        trained=ledger.trained_to_json(),
        tokens=ledger.tokens,
        corpus_sha256=hashlib.sha256(files.encode()).hexdigest(),
    )
    tokenizer = Tokenizer.from_file(str(run / "data" / TOKENIZER))
    bos, end, im_end, pad = (special_id(tokenizer, token) for token in (BOS, END, IM_END, PAD))
    config_json = write_config(
        replace(config, elastic=elastic), bos_id=bos, eos_ids=[end, im_end], pad_id=pad
    )
    save_checkpoint(folder, weights, config_json)
    write_text(folder / "manifest.json", text)
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=False) + "\n")
    write_text(folder / "tokenizer_config.json", _dump(tokenizer_config()))
    generation = {"bos_token_id": bos, "eos_token_id": [end, im_end], "pad_token_id": pad}
    write_text(folder / "generation_config.json", _dump(generation))


def tokenizer_config() -> dict[str, Any]:
    """What transformers needs beside tokenizer.json, the chat template included."""
    extra = [token for token in SPECIAL_TOKENS if token not in (BOS, END, PAD)]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 4096,
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": extra,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def _dump(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m elastic_moe.train.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="folder of a training run")
    parser.add_argument("folder", type=Path, help="checkpoint folder to write")
    args = parser.parse_args(argv)
    try:
        export(args.run, args.folder)
    except (ElasticMoEError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
