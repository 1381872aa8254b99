"""Typed access to config.json: messages name file and key, and no key is ignored in silence."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from elastic_moe.errors import CheckpointError, CheckpointWarning
from elastic_moe.routing import shorten

# Sizes beyond these are no model that exists, and would make tables of absurd length.
MAX_LAYERS = 1024
MAX_EXPERTS = 4096
MAX_SIZE = 1 << 24

# Fields of `ModelConfig` and their keys in most architectures; `Family.keys` has the others.
COMMON_KEYS: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size",),
    "num_layers": ("num_hidden_layers",),
    "num_heads": ("num_attention_heads",),
    "num_kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "max_positions": ("max_position_embeddings",),
    "rope_theta": ("rope_theta",),
    "rms_norm_eps": ("rms_norm_eps",),
    "tied_embeddings": ("tie_word_embeddings",),
}
# Keys that do not change what inference computes.
# fmt: off
_INERT = frozenset(
    {
        "architectures", "attention_dropout", "auto_map", "bos_token_id",
        "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label", "initializer_range",
        "is_decoder", "is_encoder_decoder", "label2id", "max_window_layers", "model_type",
        "moe_capacity", "moe_use_aux_free", "name_or_path", "num_nextn_predict_layers",
        "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id",
        "problem_type", "return_dict", "router_aux_loss_coef", "router_jitter_noise",
        "sep_token_id", "task_specific_params", "tokenizer_class", "torch_dtype",
        "transformers_version", "use_cache",
    }
)
# fmt: on
# Keys that change it in no architecture here, with the values that leave it alone.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "use_bias": (False, None),
    "mlp_bias": (False, None),
    "clip_qkv": (None,),
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1, 1.0),
    "compression_ratio": (None, 1, 1.0),
    "moe_gate": (None, "topk"),
    "add_cross_attention": (False,),
    "use_rmsnorm": (None, True),
    "rope_interleaved": (None,),
}
# All that a `rope_parameters` of type 'default' holds; other keys belong to other types.
_ROPE_KEYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})


@dataclass(frozen=True, slots=True)
class ConfigKeys:
    """The keys of one config.json.

    Attributes:
        data: the parsed file.
        where: its path, for messages.
        read: keys that were asked for; `finish` complains about the others.
        names: field of `ModelConfig` -> keys that may say it.
    """

    data: Mapping[str, Any]
    where: str
    read: set[str] = field(default_factory=set)
    names: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: COMMON_KEYS)

    def key(self, name: str) -> str:
        """The key that says a field of `ModelConfig`: of its keys the first in the file."""
        keys = self.names[name]
        return next((key for key in keys if key in self.data), keys[-1])

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key as config.json holds it, unchecked."""
        self.read.add(key)
        return self.data.get(key, default)

    def integer(
        self, key: str, default: int | None = None, *, least: int = 1, most: int = MAX_SIZE
    ) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise CheckpointError(
                f"{self.where}: {key} must be an integer in [{least}, {most}], "
                f"got {shorten(value)}."
            )
        return value

    def size(
        self, name: str, default: int | None = None, *, least: int = 1, most: int = MAX_SIZE
    ) -> int:
        """The integer that says a field of `ModelConfig`, under the family's key for it."""
        return self.integer(self.key(name), default, least=least, most=most)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
            raise CheckpointError(
                f"{self.where}: {key} must be a positive number, got {shorten(value)}."
            )
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(
                f"{self.where}: {key} must be true or false, got {shorten(value)}."
            )
        return value

    def neutral(self, key: str, *values: Any) -> None:
        """Refuse a key whose value is none of those that leave the mathematics alone."""
        value = self.get(key, values[0])
        if not any(type(value) is type(v) and value == v for v in values):
            raise CheckpointError(
                f"{self.where}: {key} = {shorten(value)} is not supported; "
                f"supported is {' or '.join(map(repr, values))}."
            )

    def layers(self, key: str, num_layers: int) -> frozenset[int]:
        """A list of layer numbers; none where the key is null or absent."""
        value = self.get(key) or []
        if not isinstance(value, list) or not all(
            type(i) is int and 0 <= i < num_layers for i in value
        ):
            raise CheckpointError(
                f"{self.where}: {key} must list layers in [0, {num_layers - 1}], "
                f"got {shorten(value)}."
            )
        return frozenset(value)

    def no_window(self, max_positions: int, switch: str | None = None) -> None:
        """Refuse a sliding window that is shorter than the model's positions.

        switch: the flag that turns the window on, for architectures that have one.
        """
        window = self.get("sliding_window")
        if switch is not None:
            self.neutral(switch, False)
        elif window is not None and not (type(window) is int and window >= max_positions):
            raise CheckpointError(
                f"{self.where}: sliding_window = {shorten(window)} is not supported; supported is "
                f"null or at least {self.key('max_positions')} ({max_positions})."
            )
        kinds = self.get("layer_types") or []
        if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
            raise CheckpointError(
                f"{self.where}: layer_types = {shorten(kinds)} is not supported; "
                f"supported is 'full_attention' in every layer."
            )

    def rope_theta(self, default: float) -> float:
        """The base of the rotary angles, from the old key or from transformers 5's block."""
        blocks = [self._rope_block(name) for name in ("rope_parameters", "rope_scaling")]
        block, key = blocks[0] or blocks[1], self.key("rope_theta")
        if "rope_theta" in block:
            block = {**block, key: block["rope_theta"]}
        inner = ConfigKeys({**self.data, **block}, self.where, self.read)
        inner.neutral("partial_rotary_factor", *_NEUTRAL["partial_rotary_factor"])
        return inner.number(key, default)

    def _rope_block(self, name: str) -> dict[str, Any]:
        """What one of the keys says of rotary angles, {} where it is null or absent."""
        block = self.get(name) or {}
        if not isinstance(block, dict):
            raise CheckpointError(f"{self.where}: {name} must be an object, got {shorten(block)}.")
        kind = block.get("rope_type", block.get("type", "default"))
        if kind != "default":
            raise CheckpointError(
                f"{self.where}: rope_type {shorten(kind)} is not supported, only 'default'."
            )
        given = {key for key, value in block.items() if value is not None}
        unknown = sorted(given - _ROPE_KEYS)
        if unknown:
            raise CheckpointError(
                f"{self.where}: {name} with {shorten(unknown)} is not supported; supported are "
                f"{', '.join(sorted(_ROPE_KEYS))}, alike in every layer."
            )
        return block

    def finish(self) -> None:
        """Refuse what is left and known to change the mathematics; warn of what is left unknown."""
        for key, values in _NEUTRAL.items():
            if key in self.data and key not in self.read:
                self.neutral(key, *values)
        if self.data.get("auto_map"):
            warnings.warn(
                f"{self.where}: auto_map names code that comes with the checkpoint. It is never "
                f"run; the built-in architecture is used.",
                CheckpointWarning,
                stacklevel=2,
            )
        known = self.read | _INERT | {"elastic_moe"}
        unknown = sorted(key for key in self.data if key not in known and not key.startswith("_"))
        if unknown:
            warnings.warn(
                f"{self.where}: keys that this version does not know are ignored: "
                f"{shorten(unknown)}.",
                CheckpointWarning,
                stacklevel=2,
            )
