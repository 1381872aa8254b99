"""From a training run to a checkpoint folder: `python -m elastic_moe.train.export RUN FOLDER`.

Writes the weights in bf16, config.json with the `elastic_moe` block, the tokenizer and its chat
template, and `manifest.json`: every file that was trained on, the plan, and the draws per axis.

Examples:
  python -m elastic_moe.train.export runs/mini checkpoints/mini
  python -m elastic_moe.train.export runs/mini checkpoints/mini --max-shard-size 15MiB
  elastic-moe generate checkpoints/mini --prompt "The with statement"
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from tokenizers import Tokenizer

from elastic_moe.errors import ElasticMoEError, NotGrownError, TrainingError
from elastic_moe.files import exchanging_folder, write_text
from elastic_moe.model.checkpoints.folder import (
    CONFIG,
    MANIFEST,
    is_training_manifest,
    read_json,
    read_training_manifest,
)
from elastic_moe.model.checkpoints.saving import MAX_SHARD_BYTES, save_checkpoint
from elastic_moe.model.config import ElasticBlock, ModelConfig
from elastic_moe.model.families import read_config, write_config
from elastic_moe.routing.axes import TRAINED
from elastic_moe.train.ledger import Ledger, replay
from elastic_moe.train.models import config_from_json
from elastic_moe.train.options import add_shard_size
from elastic_moe.train.step.plan import TrainingPlan
from elastic_moe.train.step.state import STATE, check_same_run, load_state
from elastic_moe.train.text.prepare import TOKENIZER, read_manifest
from elastic_moe.train.text.tokens import BOS, END, IM_END, PAD, SPECIAL_TOKENS, special_id

PARENT = "parent-manifest.json"  # of the weights that a run started with, kept in its folder
# What an export writes, and what is not carried over from an earlier one.
_WRITTEN = (
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *(CONFIG, MANIFEST, TOKENIZER, "tokenizer_config.json", "generation_config.json"),
)
_IDS = {"bos_token_id": BOS, "pad_token_id": PAD}
# Of tools it shows names, parameters' names and descriptions: whole schemas of a large application
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


def export(run: Path, folder: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> Ledger:
    """Write the checkpoint folder of the run's latest state; returns what the run did so far.

    An earlier checkpoint in `folder` is replaced as a whole, in one step where the system can; what
    else lies beside it, such as a README.md, is kept.

    Args:
        max_shard_bytes: weights beyond it are written as several files.

    Raises:
        NotGrownError: its network has not run with all layers yet: those that never ran would pass
            for trained ones.
        TrainingError: there is no state, or it is of other data. Or `folder` has files and is no
            such checkpoint.
    """
    state = run / STATE
    if not state.is_file():
        raise TrainingError(f"{state} is missing. Name the folder that --out named in training.")
    tensors, progress = load_state(state, formats=(2, 3))  # weights of both, if not what follows
    weights = {
        name.removeprefix("model."): tensor
        for name, tensor in tensors.items()
        if name.startswith("model.")
    }
    config = config_from_json(progress["model"])
    corpus, source = read_manifest(run / "data")
    check_same_run(state, progress, {"data": {**progress["data"], "source": source}})
    plan = TrainingPlan.from_json(progress["plan"])
    ledger = replay(plan, config.shape, progress["step"])
    if not ledger.trained:
        raise NotGrownError(
            f"{state} is at step {progress['step']} of {plan.total_steps}, and no step has run "
            f"with all {config.num_layers} layers. Train on, with a last stage of "
            f"{config.num_layers} layers."
        )
    files = json.dumps(corpus["files"], sort_keys=True)
    parent = read_parent(run)
    before = tokens_before(parent) or ((config.elastic.tokens or 0) if config.elastic else 0)
    elastic = ElasticBlock(
        width_granules=config.shape.width_granules,
        trained=trained_axes(ledger.trained, config),
        tokens=before + ledger.tokens,
        corpus_sha256=hashlib.sha256(files.encode()).hexdigest(),
        parent=progress.get("parent"),
    )
    manifest: dict[str, Any] = {
        "corpus": corpus,
        "training": {
            "plan": plan.to_json(),
            "steps": ledger.steps,
            "full_steps": ledger.full_steps,
            "tokens": ledger.tokens,
            "flops": ledger.flops,
            "parent": progress.get("parent"),
            "tokens_before": before,
            "draws": ledger.draws_to_json(),
        },
    }
    if parent is not None:
        manifest["before"] = parent
    tokenizer = Tokenizer.from_file(str(run / "data" / TOKENIZER))
    ids = {key: special_id(tokenizer, token) for key, token in _IDS.items()}
    eos = [special_id(tokenizer, END), special_id(tokenizer, IM_END)]
    generation = {**ids, "eos_token_id": eos}
    config_json = _config_json(run, config, elastic, generation)
    with _replacing(folder) as beside:
        save_checkpoint(beside, weights, config_json, max_shard_bytes=max_shard_bytes)
        write_text(beside / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        write_text(beside / "tokenizer.json", tokenizer.to_str(pretty=False) + "\n")
        write_text(beside / "tokenizer_config.json", _dump(tokenizer_config(config.max_positions)))
        write_text(beside / "generation_config.json", _dump(generation))
    return ledger


def trained_axes(
    drawn: Mapping[str, Collection[float]], config: ModelConfig
) -> dict[str, tuple[float, ...]]:
    """What a checkpoint may say that it was trained to give up: axes that were really reduced.

    An axis whose only value was the model's full one is left out. What the weights that a run
    started with were trained for counts where this run reduced the same axis, and so kept it up.
    """
    full = {axis.trained: axis.whole(config.shape) for axis in TRAINED}
    before = config.elastic.trained if config.elastic else {}
    return {
        axis: tuple(sorted({*values, *before.get(axis, ())}))
        for axis, values in drawn.items()
        if set(values) != {full[axis]}
    }


def _config_json(
    run: Path, config: ModelConfig, elastic: ElasticBlock, ids: Mapping[str, Any]
) -> dict[str, Any]:
    """config.json: of the run's own, where it was started with one, else of its sizes.

    Raises:
        TrainingError: the run's is of another model than its state.
    """
    config, path = replace(config, elastic=elastic), run / CONFIG
    if not path.is_file():
        return write_config(
            config,
            bos_id=ids["bos_token_id"],
            eos_ids=ids["eos_token_id"],
            pad_id=ids["pad_token_id"],
        )
    own = {"elastic_moe": elastic.to_json(), "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    raw = {**read_json(run, CONFIG), **ids, **own}
    if read_config(raw, str(path)) != config:
        raise TrainingError(f"{path} is of another model than {run / STATE}. Restore the file.")
    return raw


def check_target(folder: Path) -> list[Path]:
    """What lies in a folder that a checkpoint is to be written to.

    Raises:
        TrainingError: it is a file, or has files and is no checkpoint of a training run.
    """
    old = sorted(folder.iterdir()) if folder.is_dir() else []
    if (old and not _is_exported(folder)) or (folder.exists() and not folder.is_dir()):
        raise TrainingError(
            f"{folder} exists and is no checkpoint of a training run. Name a new folder, "
            f"or move it away."
        )
    return old


def _is_exported(folder: Path) -> bool:
    """Whether an export of a run wrote the folder: `extract` and other tools have manifests too."""
    manifest = read_training_manifest(folder)
    return bool(manifest) and "extracted" not in manifest


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """As `exchanging_folder`, for a checkpoint: what a user put beside it comes along.

    Raises:
        TrainingError: as `check_target`; or the folder cannot be written.
    """
    folder = folder.resolve()
    old = check_target(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with exchanging_folder(folder) as beside:
            yield beside
            for path in old:
                if any(fnmatch(path.name, own) for own in _WRITTEN):
                    continue
                if path.is_dir() and not path.is_symlink():
                    shutil.copytree(path, beside / path.name, symlinks=True)
                else:
                    shutil.copy2(path, beside / path.name, follow_symlinks=False)
    except (SafetensorError, OSError) as error:
        raise TrainingError(
            f"{folder} cannot be written: {error}. The state of the run is kept, and so is an "
            f"earlier checkpoint. Make room and see that the folder can be written to, then repeat "
            f"the command."
        ) from None


def keep_parent(run: Path, checkpoint: Path) -> bool:
    """Copy a checkpoint's manifest into the folder of a run; False if it has none of a training.

    The manifest that the run's export writes holds it as "before", so that every file and every
    step that led to the weights stays on record.
    """
    manifest = read_training_manifest(checkpoint)
    if not manifest:
        return False
    run.mkdir(parents=True, exist_ok=True)
    write_text(run / PARENT, json.dumps(manifest, indent=1) + "\n")
    return True


def read_parent(run: Path) -> dict[str, Any] | None:
    """What `keep_parent` kept; None if nothing.

    Raises:
        TrainingError: it is no manifest.
    """
    path = run / PARENT
    if not path.is_file():
        return None
    try:
        manifest: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        manifest = None
    if is_training_manifest(manifest):
        return dict(manifest)
    raise TrainingError(
        f"{path} is no manifest of a checkpoint: it must hold 'corpus' and 'training'. Copy "
        f"{MANIFEST} of the checkpoint that the run started with there again."
    )


def tokens_before(manifest: dict[str, Any] | None) -> int:
    """Tokens that the weights which a manifest belongs to had read, all trainings together."""
    if manifest is None:
        return 0
    training = manifest["training"]
    return int(training["tokens"]) + int(training.get("tokens_before", 0))


def tokenizer_config(max_positions: int = 4096) -> dict[str, Any]:
    """What transformers needs beside tokenizer.json, the chat template included."""
    extra = [token for token in SPECIAL_TOKENS if token not in (BOS, END, PAD)]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_positions,
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
    add_shard_size(parser)
    args = parser.parse_args(argv)
    try:
        export(args.run, args.folder, max_shard_bytes=args.max_shard_bytes)
    except (ElasticMoEError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
