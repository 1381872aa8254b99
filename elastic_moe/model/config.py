"""What a checkpoint's config.json says about the mathematics, in our terms.

One reader per `model_type` translates Hugging Face keys to `ModelConfig`, and refuses by name every
key that would change the mathematics in a way that is not implemented. The rest of the package sees
`ModelConfig` alone: an architecture is a row of traits, not a branch somewhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from elastic_moe.errors import CheckpointError
from elastic_moe.routing import ModelShape

ELASTIC_FORMAT = 1


@dataclass(frozen=True, slots=True)
class ElasticBlock:
    """The `elastic_moe` entry of config.json: what the checkpoint was trained to give up.

    Attributes:
        width_granules: parts that an expert's hidden channels can be cut into.
        trained: values of each axis that training drew ('depth', 'top_k', 'width', 'pool',
            'threshold'); empty for a checkpoint that was not trained elastically.
        tokens: training tokens.
        corpus_sha256: of the training manifest.
        parent, subnet: where an extracted checkpoint came from.
    """

    width_granules: int = 1
    trained: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    tokens: int | None = None
    corpus_sha256: str | None = None
    parent: str | None = None
    subnet: str | None = None

    def was_trained(self, axis: str, value: float) -> bool:
        """Whether training drew this value; a threshold counts if it lies among those drawn."""
        drawn = self.trained.get(axis, ())
        if axis == "threshold" and drawn and value > 0:
            positive = [t for t in drawn if t > 0]
            return bool(positive) and min(positive) <= value <= max(positive)
        return value in drawn

    def to_json(self) -> dict[str, Any]:
        return {
            "format": ELASTIC_FORMAT,
            "width_granules": self.width_granules,
            "trained": {axis: list(values) for axis, values in self.trained.items()},
            "tokens": self.tokens,
            "corpus_sha256": self.corpus_sha256,
            "parent": self.parent,
            "subnet": self.subnet,
        }


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only mixture-of-experts transformer, independent of any vendor's key names."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    max_top_k: int
    expert_hidden: int
    max_positions: int
    rope_theta: float
    rms_norm_eps: float
    tied_embeddings: bool
    qk_norm: Literal["none", "head", "all"]
    renormalize: bool
    routing_epsilon: float = 0.0
    elastic: ElasticBlock | None = None

    @property
    def shape(self) -> ModelShape:
        return ModelShape(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
            num_experts=self.num_experts,
            max_top_k=self.max_top_k,
            expert_hidden=self.expert_hidden,
            moe_layers=frozenset(range(self.num_layers)),
            width_granules=self.elastic.width_granules if self.elastic else 1,
            qk_norm=self.qk_norm,
            tied_embeddings=self.tied_embeddings,
        )


def read_config(data: Mapping[str, Any], where: str) -> ModelConfig:
    """The configuration that a parsed config.json means.

    Args:
        data: the parsed file.
        where: its path, for messages.

    Raises:
        CheckpointError: an unknown architecture, a missing or ill-typed key, or a key whose value
            changes the mathematics in a way that is not implemented.
    """
    model_type = data.get("model_type")
    if model_type not in _READERS:
        known = ", ".join(sorted(_READERS))
        raise CheckpointError(
            f"{where}: model_type is {model_type!r}, which is not supported. Supported: {known}."
        )
    config = _READERS[model_type](_Keys(data, where))
    _check_sizes(config, where)
    return config


def _check_sizes(config: ModelConfig, where: str) -> None:
    """Refuse sizes that do not go together."""
    heads, groups = config.num_heads, config.num_kv_heads
    granules = config.elastic.width_granules if config.elastic else 1
    wrong = {
        f"num_key_value_heads {groups} must divide num_attention_heads {heads}": heads % groups,
        f"head_dim {config.head_dim} must be even": config.head_dim % 2,
        f"num_experts_per_tok {config.max_top_k} must be at most num_experts "
        f"{config.num_experts}": config.max_top_k > config.num_experts,
        f"elastic_moe.width_granules {granules} must divide moe_intermediate_size "
        f"{config.expert_hidden}": config.expert_hidden % granules,
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise CheckpointError(f"{where}: {message}.")


@dataclass(frozen=True, slots=True)
class _Keys:
    """Typed access to config.json with messages that name file and key."""

    data: Mapping[str, Any]
    where: str

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.data.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{self.where}: {key} must be a positive integer, got {value!r}.")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.data.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise CheckpointError(f"{self.where}: {key} must be a positive number, got {value!r}.")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.data.get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.where}: {key} must be true or false, got {value!r}.")
        return value

    def neutral(self, **allowed: tuple[Any, ...]) -> None:
        """Refuse every key whose value is none of those that leave the mathematics alone."""
        for key, values in allowed.items():
            value = self.data.get(key, values[0])
            if value not in values:
                raise CheckpointError(
                    f"{self.where}: {key} = {value!r} is not supported; "
                    f"supported is {' or '.join(map(repr, values))}."
                )

    def rope_theta(self) -> float:
        """The base of the rotary angles, from the old key or from transformers 5's block."""
        block = self.data.get("rope_parameters") or self.data.get("rope_scaling") or {}
        if not isinstance(block, dict):
            raise CheckpointError(
                f"{self.where}: rope_parameters must be an object, got {block!r}."
            )
        kind = block.get("rope_type", block.get("type", "default"))
        if kind != "default":
            raise CheckpointError(
                f"{self.where}: rope_type {kind!r} is not supported, only 'default'."
            )
        return _Keys({**self.data, **block}, self.where).number("rope_theta", 10000.0)

    def elastic(self) -> ElasticBlock | None:
        block = self.data.get("elastic_moe")
        if block is None:
            return None
        version = block.get("format") if isinstance(block, dict) else None
        if version != ELASTIC_FORMAT:
            raise CheckpointError(
                f"{self.where}: elastic_moe.format is {version!r}, this version reads "
                f"{ELASTIC_FORMAT}. Update elastic-moe."
            )
        trained = block.get("trained") or {}
        if not isinstance(trained, dict) or not all(isinstance(v, list) for v in trained.values()):
            raise CheckpointError(
                f"{self.where}: elastic_moe.trained must hold a list of values per axis, "
                f"got {trained!r}."
            )
        return ElasticBlock(
            width_granules=_Keys(block, self.where).integer("width_granules", 1),
            trained={axis: tuple(values) for axis, values in trained.items()},
            tokens=block.get("tokens"),
            corpus_sha256=block.get("corpus_sha256"),
            parent=block.get("parent"),
            subnet=block.get("subnet"),
        )


def _qwen3_moe(keys: _Keys) -> ModelConfig:
    keys.neutral(
        hidden_act=("silu",),
        attention_bias=(False,),
        use_sliding_window=(False,),
        mlp_only_layers=([], None),
        decoder_sparse_step=(1,),
    )
    hidden_size, num_heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    return ModelConfig(
        model_type="qwen3_moe",
        vocab_size=keys.integer("vocab_size"),
        hidden_size=hidden_size,
        num_layers=keys.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=keys.integer("num_key_value_heads"),
        head_dim=keys.integer("head_dim", hidden_size // num_heads),
        # transformers 5 writes the second key.
        num_experts=keys.integer(
            "num_experts" if "num_experts" in keys.data else "num_local_experts"
        ),
        max_top_k=keys.integer("num_experts_per_tok"),
        expert_hidden=keys.integer("moe_intermediate_size"),
        max_positions=keys.integer("max_position_embeddings"),
        rope_theta=keys.rope_theta(),
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        tied_embeddings=keys.flag("tie_word_embeddings", False),
        qk_norm="head",
        renormalize=keys.flag("norm_topk_prob", False),
        elastic=keys.elastic(),
    )


_READERS: dict[str, Callable[[_Keys], ModelConfig]] = {"qwen3_moe": _qwen3_moe}


def write_config(
    config: ModelConfig, *, bos_id: int, eos_ids: list[int], pad_id: int
) -> dict[str, Any]:
    """The config.json of a Qwen3-MoE checkpoint that transformers loads unchanged."""
    data: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.expert_hidden,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.max_top_k,
        "moe_intermediate_size": config.expert_hidden,
        "norm_topk_prob": config.renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "initializer_range": 0.02,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "use_cache": True,
        "bos_token_id": bos_id,
        "eos_token_id": eos_ids,
        "pad_token_id": pad_id,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }
    if config.elastic is not None:
        data["elastic_moe"] = config.elastic.to_json()
    return data
