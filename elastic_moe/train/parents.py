"""What the weights that a run began with were trained on: their manifest, kept with the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from elastic_moe.errors import TrainingError
from elastic_moe.files import write_text
from elastic_moe.model.checkpoints.folder import (
    MANIFEST,
    is_training_manifest,
    read_training_manifest,
)

PARENT = "parent-manifest.json"


def keep_parent(run: Path, checkpoint: Path) -> bool:
    """Copy a checkpoint's manifest into the folder of a run; False if none tells of a training.

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
        f"{MANIFEST} of the checkpoint that the run began with there again."
    )


def tokens_before(manifest: dict[str, Any] | None) -> int:
    """Tokens that the weights which a manifest belongs to had read, all trainings together."""
    if manifest is None:
        return 0
    training = manifest["training"]
    return int(training["tokens"]) + int(training.get("tokens_before", 0))
