"""The `elastic_moe` block of config.json."""

from __future__ import annotations

from elastic_moe.errors import CheckpointError
from elastic_moe.model.config import ELASTIC_FORMAT, ElasticBlock
from elastic_moe.model.families.config_keys import ConfigKeys
from elastic_moe.routing import shorten


def read_elastic(keys: ConfigKeys) -> ElasticBlock | None:
    """What the checkpoint says of its elastic axes; None where it says nothing.

    Raises:
        CheckpointError: the block is of a newer format, or ill-typed.
    """
    block = keys.get("elastic_moe")
    if block is None:
        return None
    version = block.get("format") if isinstance(block, dict) else None
    if type(version) is not int or version != ELASTIC_FORMAT:
        raise CheckpointError(
            f"{keys.where}: elastic_moe.format is {shorten(version)}, this version reads "
            f"{ELASTIC_FORMAT}. Update elastic-moe."
        )
    trained = block.get("trained") or {}
    if not isinstance(trained, dict) or not all(_are_numbers(v) for v in trained.values()):
        raise CheckpointError(
            f"{keys.where}: elastic_moe.trained must hold a list of values per axis, "
            f"got {shorten(trained)}."
        )
    for name, kind in (("tokens", int), ("corpus_sha256", str), ("parent", str), ("subnet", str)):
        if not isinstance(block.get(name), (kind, type(None))):
            raise CheckpointError(
                f"{keys.where}: elastic_moe.{name} must be a {kind.__name__} or null, "
                f"got {shorten(block[name])}."
            )
    return ElasticBlock(
        width_granules=ConfigKeys(block, f"{keys.where}: elastic_moe").integer("width_granules", 1),
        trained={axis: tuple(values) for axis, values in trained.items()},
        tokens=block.get("tokens"),
        corpus_sha256=block.get("corpus_sha256"),
        parent=block.get("parent"),
        subnet=block.get("subnet"),
    )


def _are_numbers(values: object) -> bool:
    return isinstance(values, list) and all(type(v) in (int, float) for v in values)
