"""What an architecture's checkpoints look like: the keys of config.json and the names of tensors.

Our parameters are named as in transformers, without the leading `model.`; the routed experts of a
layer are stacked into one `mlp.experts.gate_proj`, `up_proj` (E, F, D) and `down_proj` (E, D, F).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from elastic_moe.model.config import ModelConfig
from elastic_moe.model.families.config_keys import COMMON_KEYS, ConfigKeys

Shape = tuple[int, ...]
EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Source:
    """A stored tensor that one of our parameters comes from.

    Attributes:
        tensor: its name in the files.
        shape: its shape there.
        index: the part of it that is meant; () for the whole.
    """

    tensor: str
    shape: Shape
    index: tuple[int | slice, ...] = ()


PREFIXES = {  # of our names -> of transformers'
    "layers.": "model.layers.",
    "embed_tokens.": "model.embed_tokens.",
    "norm.": "model.norm.",
    "lm_head.": "lm_head.",
}


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture.

    Attributes:
        title: its name in text.
        architecture: transformers' class of it.
        read: config.json to `ModelConfig`.
        keys: field of `ModelConfig` -> keys of config.json that may say it, the newest last. Those
            of `COMMON_KEYS` need no entry where the key is the common one. `num_experts`,
            `max_top_k`, `expert_hidden` and `shared_experts` need one, as `extract` writes them;
            `read` takes other keys by name.
        place_experts: the keys of config.json that say which layers route; None in a family in
            which all do.
        names: beginnings of our names after `layers.N.` -> what the hub's files have instead; the
            longest that fits counts.
        prefixes: beginnings of our names -> what the files have instead, where they differ from
            `PREFIXES`, such as {"layers.": "transformer.h."}.
        parts: what they call an expert's gate_proj, up_proj and down_proj.
        selection_bias: where they keep the router's bias, after `layers.N.`.
        ignored: beginnings of the names of tensors that inference does not use.
    """

    title: str
    architecture: str
    read: Callable[[ConfigKeys], ModelConfig]
    keys: Mapping[str, tuple[str, ...]]
    place_experts: Callable[[ModelConfig], dict[str, Any]] | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    prefixes: Mapping[str, str] = field(default_factory=dict)
    parts: tuple[str, str, str] = EXPERT_PARTS
    selection_bias: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    @property
    def all_keys(self) -> Mapping[str, tuple[str, ...]]:
        """`keys`, and the common ones of other fields."""
        return {**COMMON_KEYS, **self.keys}

    def prefix(self, ours: str) -> str:
        """What the hub's files have instead of a beginning of our names, one of `PREFIXES`."""
        return {**PREFIXES, **self.prefixes}[ours]

    def stored_name(self, rest: str) -> str:
        """What the hub's files call one of our parameters; both after `layers.N.`."""
        for ours in sorted(self.names, key=len, reverse=True):
            if rest.startswith(ours):
                return self.names[ours] + rest.removeprefix(ours)
        return rest

    def sources(self, config: ModelConfig, name: str, shape: Shape) -> Iterator[list[Source]]:
        """Ways in which files may hold one of our parameters, the hub's own way first.

        A list of several sources is stacked along a new first axis.
        """
        ours = next(prefix for prefix in PREFIXES if name.startswith(prefix))
        rest = name.removeprefix(ours)
        if ours != "layers.":
            yield [Source(self.prefix(ours) + rest, shape)]
            return
        number, _, rest = rest.partition(".")
        layer = f"{self.prefix(ours)}{number}."
        if rest.startswith("mlp.experts."):
            part = rest.removeprefix("mlp.experts.")
            stored = self.parts[EXPERT_PARTS.index(part)]
            experts = layer + self.stored_name("mlp.experts.")
            yield [
                Source(f"{experts}{expert}.{stored}.weight", shape[1:])
                for expert in range(config.num_experts)
            ]
            yield [self._fused(f"{layer}mlp.experts", part, shape)]
        elif rest == "mlp.correction_bias":
            for stored in self.selection_bias:
                yield [Source(layer + stored, (1, *shape), (0,))]
                yield [Source(layer + stored, shape)]
        else:
            yield [Source(layer + self.stored_name(rest), shape)]
            yield [Source(layer + rest, shape)]

    @staticmethod
    def _fused(prefix: str, part: str, shape: Shape) -> Source:
        """The layout of transformers 5 in memory: gate and up of all experts in one tensor."""
        if part == "down_proj":
            return Source(f"{prefix}.down_proj", shape)
        experts, channels, hidden = shape
        first = 0 if part == "gate_proj" else channels
        half = slice(first, first + channels)
        return Source(
            f"{prefix}.gate_up_proj", (experts, 2 * channels, hidden), (slice(None), half)
        )


def parameter_shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    """Name and shape of every parameter of `ElasticTransformer`, layer by layer."""
    D, E, F = config.hidden_size, config.num_experts, config.expert_hidden
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield "embed_tokens.weight", (config.vocab_size, D)
    for i in range(config.num_layers):
        layer = f"layers.{i}"
        yield f"{layer}.input_layernorm.weight", (D,)
        yield f"{layer}.self_attn.q_proj.weight", (q, D)
        yield f"{layer}.self_attn.k_proj.weight", (kv, D)
        yield f"{layer}.self_attn.v_proj.weight", (kv, D)
        yield f"{layer}.self_attn.o_proj.weight", (D, q)
        if config.qk_norm != "none":
            per_head = config.qk_norm == "head"
            yield f"{layer}.self_attn.q_norm.weight", (config.head_dim if per_head else q,)
            yield f"{layer}.self_attn.k_norm.weight", (config.head_dim if per_head else kv,)
        yield f"{layer}.post_attention_layernorm.weight", (D,)
        if i in config.dense_layers:
            yield from _mlp(f"{layer}.mlp", config.dense_hidden, D)
            continue
        yield f"{layer}.mlp.gate.weight", (E, D)
        if config.selection_bias:
            yield f"{layer}.mlp.correction_bias", (E,)
        yield f"{layer}.mlp.experts.gate_proj", (E, F, D)
        yield f"{layer}.mlp.experts.up_proj", (E, F, D)
        yield f"{layer}.mlp.experts.down_proj", (E, D, F)
        if config.shared_hidden:
            yield from _mlp(f"{layer}.mlp.shared_experts", config.shared_hidden, D)
    yield "norm.weight", (D,)
    if not config.tied_embeddings:
        yield "lm_head.weight", (config.vocab_size, D)


def _mlp(prefix: str, channels: int, hidden: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}.gate_proj.weight", (channels, hidden)
    yield f"{prefix}.up_proj.weight", (channels, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, channels)
