"""A sub-network leaves as a standard checkpoint: layers, experts and channels are really cut.

transformers, vLLM and llama.cpp run the result without knowing of elastic axes. What a standard
config.json cannot say (a threshold, values that differ from layer to layer) is an error.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from elastic_moe_kernels.arrays import Array, array, to_dtype
from numpy.typing import NDArray

from elastic_moe.errors import CheckpointWarning, ExtractError
from elastic_moe.files import replacing_folder, write_text
from elastic_moe.model.checkpoints.checkpoint import Checkpoint
from elastic_moe.model.checkpoints.folder import (
    CONFIG,
    MANIFEST,
    checkpoint_name,
    file_in,
    find_checkpoint,
    read_training_manifest,
)
from elastic_moe.model.checkpoints.saving import (
    MAX_SHARD_BYTES,
    Item,
    write_config_json,
    write_tensors,
)
from elastic_moe.model.config import ElasticBlock, ModelConfig
from elastic_moe.model.families import EXPERT_PARTS, FAMILIES, parameter_shapes, read_config
from elastic_moe.routing import ModelShape, Subnet, parse_name, shorten
from elastic_moe.routing.axes import (
    DEPTH,
    MIN_EXPERTS,
    PER_LAYER,
    POOL,
    TOP_K,
    TRAINED,
    WIDTH,
    Axis,
)
from elastic_moe.routing.subnet import full_layer

# What travels with the weights, where the parent has it.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
)
CARD = "README.md"
# Added to a score in [0, 1], it keeps an expert from ever being chosen; finite, as weights must be.
EXCLUDED = -1e9
ChannelOrder = Mapping[int, Array]  # layer -> (E, F): which channel comes first, second, ...


class Resolvable(Protocol):
    """Such as `ElasticRoutingConfig`."""

    def resolve(self, shape: ModelShape) -> Subnet: ...


def extract(
    model: str | Path,
    routing: str | Subnet | Resolvable,
    out: str | Path,
    *,
    pool_as_bias: bool = False,
    channel_order: ChannelOrder | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write a sub-network of a checkpoint as a checkpoint of its own.

    Args:
        model: a bundled name, a folder, or an id in the Hugging Face cache.
        routing: the sub-network: a name, a `Subnet`, or an `ElasticRoutingConfig`.
        out: the folder to make; it must not exist, or be empty.
        pool_as_bias: keep all experts and shut out those beyond the pool by the router's selection
            bias, where the architecture has one: pools may then differ in size from layer to layer.
            Exact where the biases of a pool's experts are all equal. Elsewhere, which a
            `CheckpointWarning` says, some tokens choose otherwise: scores are then normalised over
            all experts, so that a bias weighs more against them than in the pool alone.
        channel_order: for every MoE layer, the order of each expert's channels before the cut.
        max_shard_bytes: weights beyond it are written as several files.

    Returns:
        The folder. It appears whole or not at all.

    Raises:
        RoutingError: the model has no such sub-network.
        ExtractError: a standard checkpoint cannot say it, or `out` has something in it.
        CheckpointError: the parent cannot be read.
    """
    folder, target = find_checkpoint(model), Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExtractError(f"{target} exists and is not empty. Name a new folder with --out.")
    parent = Checkpoint(folder)
    shape = parent.config.shape
    if isinstance(routing, str):
        subnet = parse_name(shape, routing)
    else:
        subnet = routing if isinstance(routing, Subnet) else routing.resolve(shape)
    cut = _Cut(parent, subnet, pool_as_bias, channel_order or {})
    parent_id = f"{checkpoint_name(folder)} sha256:{parent.files.sha256()}"
    raw = cut.config_json(parent_id)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing_folder(target) as beside:
        write_tensors(beside, cut.items(), max_shard_bytes)
        write_config_json(beside, raw)
        _copy_companions(folder, beside, subnet)
        _copy_manifest(folder, beside, cut, parent_id)
    return target


class _Cut:
    """Which layers, experts and channels of the parent make up the child."""

    def __init__(
        self, parent: Checkpoint, subnet: Subnet, pool_as_bias: bool, order: ChannelOrder
    ) -> None:
        self.parent, self.subnet, self.order = parent, subnet, order
        self.old, self.family = parent.config, FAMILIES[parent.config.model_type]
        self.layers = subnet.active_layers  # the child's layer i is the parent's layers[i]
        self.pools = {
            i: subnet.layers[i].expert_pool for i in self.layers if i not in self.old.dense_layers
        }
        if pool_as_bias and not self.old.selection_bias:
            raise ExtractError(
                f"{self.old.model_type} has no selection bias that could shut experts out. "
                f"Leave out pool_as_bias, and the other experts are removed."
            )
        self.pool_as_bias = pool_as_bias
        if pool_as_bias:
            self._warn_of_unequal_biases()
        self.new = self._config()

    def _config(self) -> ModelConfig:
        old = self.old
        full = full_layer(old.shape)
        for other in PER_LAYER if self.pools else ():
            # Without a threshold, min_experts means nothing.
            cuttable = other in (TOP_K, MIN_EXPERTS, WIDTH, POOL)
            if not cuttable and self.subnet.uniform(other.name) != getattr(full, other.name):
                self._refuse(
                    f"a {other.name.replace('_', ' ')}",
                    "Leave it to the engine that runs the checkpoint.",
                )
        values: dict[str, int] = {}
        for axis in (TOP_K, WIDTH):
            value = self.subnet.uniform(axis.name)
            if value is None and self.pools:
                self._refuse(f"{axis.name} that differs from layer to layer", "Use one value.")
            values[axis.name] = value or 0
        sizes = {len(pool) for pool in self.pools.values()}
        if len(sizes) > 1 and not self.pool_as_bias:
            remedy = "Use pools of one size" + (", or pool_as_bias." if old.selection_bias else ".")
            self._refuse("pools of different sizes", remedy)
        if not self.pools:  # nothing that routes is left: what is left of experts is not used
            changed: dict[str, Any] = {}
        else:
            channels = values[WIDTH.name] * old.shape.channels_per_granule
            # Shared experts are counted in whole experts: zeros fill up the last.
            shared = -(-old.shared_hidden // channels)
            changed = {
                "max_top_k": values[TOP_K.name],
                "expert_hidden": channels,
                "num_experts": old.num_experts if self.pool_as_bias else sizes.pop(),
                "shared_experts": shared,
                "shared_hidden": shared * channels,
            }
        dense = frozenset(new for new, i in enumerate(self.layers) if i in old.dense_layers)
        return replace(
            old,
            **changed,
            num_layers=len(self.layers),
            dense_layers=dense,
            dense_hidden=old.dense_hidden if dense else 0,
            elastic=self._elastic(values[WIDTH.name]),
        )

    def _refuse(self, what: str, remedy: str) -> None:
        raise ExtractError(
            f"sub-network {self.subnet.name!r} has {what}, which no standard config.json of "
            f"{self.old.model_type} can say. {remedy}"
        )

    def _warn_of_unequal_biases(self) -> None:
        unequal = []
        for layer, pool in self.pools.items():
            biases = self.parent.read(f"layers.{layer}.mlp.correction_bias")[list(pool)]
            if len(pool) < self.old.num_experts and (biases != biases[0]).any():
                unequal.append(layer)
        if unequal:
            warnings.warn(
                f"pool_as_bias is not exact in layers {shorten(unequal)}: the biases of their "
                f"experts differ, and scores are now normalised over all experts. Without it the "
                f"extracted checkpoint is exact.",
                CheckpointWarning,
                stacklevel=4,
            )

    def _elastic(self, width: int) -> ElasticBlock:
        """What is left of what the parent was trained for."""
        old = self.old.elastic or ElasticBlock()
        most: dict[str, float] = {
            str(axis.trained): self._most_left(axis) for axis in TRAINED if axis.per_layer
        }
        most[str(DEPTH.trained)] = len(self.layers) if self.subnet.is_prefix else 0
        trained = {
            axis: tuple(v for v in values if v <= most.get(axis, 0))
            for axis, values in old.trained.items()
        }
        return replace(
            old,
            width_granules=width or self.old.width_granules,
            trained={axis: values for axis, values in trained.items() if values},
            subnet=self.subnet.name,
        )

    def _most_left(self, axis: Axis) -> float:
        """The largest value of an axis that the child can run; 0 where its layers differ."""
        if axis.kind == "real":
            return axis.largest
        value = self.subnet.uniform(axis.name) or 0
        if not isinstance(value, tuple):
            return int(value)
        return len(value) if value == tuple(range(len(value))) else 0

    def config_json(self, parent: str) -> dict[str, Any]:
        """The parent's config.json with the child's sizes, read back to be sure."""
        raw = dict(self.parent.raw)
        for field, keys in self.family.all_keys.items():
            if getattr(self.new, field) != getattr(self.old, field):
                for key in [key for key in keys if key in raw] or keys[-1:]:
                    raw[key] = getattr(self.new, field)
        if self.family.place_experts is not None:
            raw.update(self.family.place_experts(self.new))
        if isinstance(raw.get("layer_types"), list):
            raw["layer_types"] = [raw["layer_types"][i] for i in self.layers]
        elastic = replace(self.new.elastic or ElasticBlock(), parent=parent)
        raw["elastic_moe"] = elastic.to_json()
        read, wanted = read_config(raw, CONFIG), replace(self.new, elastic=elastic)
        wrong = [
            f"{item.name} {getattr(read, item.name)} instead of {getattr(wanted, item.name)}"
            for item in fields(wanted)
            if getattr(read, item.name) != getattr(wanted, item.name)
        ]
        if wrong:
            raise ExtractError(
                f"the config.json of sub-network {self.subnet.name!r} would say "
                f"{', '.join(wrong)}. The keys of {wanted.model_type}'s Family name every size "
                f"that a sub-network changes."
            )
        return raw

    def routing(self) -> dict[str, Any]:
        """What the sub-network is, as arguments of `resolve`: not every name can be read back."""
        entry: dict[str, Any] = {str(DEPTH.members): list(self.layers)}
        if self.pools:
            every = list(range(self.old.num_experts))
            pools = [list(self.pools.get(i, every)) for i in range(self.old.num_layers)]
            same = self.subnet.uniform(POOL.name)
            entry |= {axis.name: self.subnet.uniform(axis.name) for axis in (TOP_K, WIDTH)}
            entry |= {POOL.name: pools if same is None else list(same)}
        return entry

    def items(self) -> list[Item]:
        """The child's tensors in the layout of the hub; values are read when they are written."""
        items = []
        for name, shape in parameter_shapes(self.new):
            old_name, layer = self._old_name(name)
            dtype = self.parent.files.dtype(self.parent.sources(old_name)[0].tensor)
            sources = next(self.family.sources(self.new, name, shape))
            if name.endswith(EXPERT_PARTS):
                for expert, source in enumerate(sources):
                    reader = _Reader(self, old_name, layer, source.shape, expert)
                    items.append(Item(source.tensor, source.shape, dtype, reader))
            else:
                (source,) = sources
                biased = self.pool_as_bias and name.endswith("correction_bias")
                dtype = "float32" if biased else dtype  # bf16 would round what it adds to
                reader = _Reader(self, old_name, layer, source.shape, None)
                items.append(Item(source.tensor, source.shape, dtype, reader))
        return items

    def _old_name(self, name: str) -> tuple[str, int]:
        """The parent's name of one of the child's parameters, and its layer there (-1: none)."""
        if not name.startswith("layers."):
            return name, -1
        new, _, rest = name.removeprefix("layers.").partition(".")
        layer = self.layers[int(new)]
        return f"layers.{layer}.{rest}", layer


class _Reader:
    """Reads one tensor of the child when it is called."""

    def __init__(
        self, cut: _Cut, name: str, layer: int, shape: tuple[int, ...], expert: int | None
    ) -> None:
        self.cut, self.name, self.layer = cut, name, layer
        self.shape, self.expert = shape, expert

    def __call__(self) -> NDArray[Any]:
        return self._values().reshape(self.shape)

    def _values(self) -> NDArray[Any]:
        cut, name = self.cut, self.name
        pool = () if cut.pool_as_bias else cut.pools.get(self.layer, ())
        if self.expert is not None:
            number = pool[self.expert] if pool else self.expert
            return self._channels(cut.parent.read_expert(name, number), number)
        whole = cut.parent.read(name)
        if name.endswith("mlp.gate.weight") and pool:
            return whole[list(pool)]
        if name.endswith("mlp.correction_bias"):
            if cut.pool_as_bias:
                biases = np.full(len(whole), EXCLUDED, np.float32)
                inside = list(cut.pools[self.layer])
                biases[inside] = to_dtype(whole, "float32")[inside]
                return biases
            return whole[list(pool)]
        if ".shared_experts." in name and whole.shape != self.shape:
            padded = np.zeros(self.shape, whole.dtype)
            padded[: whole.shape[0], : whole.shape[1]] = whole
            return padded
        return whole

    def _channels(self, weight: NDArray[Any], expert: int) -> NDArray[Any]:
        """The channels that stay, in the order in which they count."""
        channels = self.cut.new.expert_hidden
        order = self.cut.order.get(self.layer)
        kept = np.arange(channels) if order is None else array(order)[expert, :channels]
        return weight[:, kept] if self.name.endswith("down_proj") else weight[kept]


def _copy_companions(folder: Path, target: Path, subnet: Subnet) -> None:
    for name in COMPANIONS:
        if (folder / name).exists():
            shutil.copyfile(file_in(folder, name), target / name)
    if (folder / CARD).exists():
        text = file_in(folder, CARD).read_bytes().rstrip() + b"\n\n"
    else:
        text = b""
    note = (
        f"## Extracted sub-network\n\nThis checkpoint is sub-network `{subnet.name}` of "
        f"{checkpoint_name(folder)}, cut out by elastic-moe. What is said above of sizes and "
        f"quality is about the whole.\n"
    )
    (target / CARD).write_bytes(text + note.encode())


def _copy_manifest(folder: Path, target: Path, cut: _Cut, parent_id: str) -> None:
    """How the weights were trained, where the parent records it, and the cut since.

    So a ledger knows what was spent before the sub-network was trained on alone.
    """
    manifest = read_training_manifest(folder)
    if not manifest:
        return
    entry = {
        "subnet": cut.subnet.name,
        "parent": parent_id,
        "routing": cut.routing(),
        "config": cut.parent.raw,
    }
    if "extracted" in manifest:  # the parent was cut out itself
        entry["of"] = manifest["extracted"]
    write_text(target / MANIFEST, json.dumps({**manifest, "extracted": entry}, indent=1) + "\n")
