"""What a checkpoint's config.json says about the mathematics, in our terms.

`families` translates each architecture's keys to `ModelConfig`. The rest of the package sees
`ModelConfig` alone: an architecture is a row of traits, not a branch somewhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from elastic_moe.routing import ModelShape

ELASTIC_FORMAT = 1
DEFAULT_GRANULES = 8  # of a checkpoint that names none and whose experts divide


@dataclass(frozen=True, slots=True)
class ElasticBlock:
    """The `elastic_moe` entry of config.json: what the checkpoint was trained to give up.

    Attributes:
        width_granules: parts that an expert's hidden channels can be cut into.
        trained: values of each axis that training drew, by `Axis.trained`; empty for a checkpoint
            that was not trained elastically.
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


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only mixture-of-experts transformer, independent of any vendor's key names.

    Attributes:
        model_type: the family whose keys and tensor names the checkpoint uses.
        expert_hidden: hidden channels of each routed expert.
        dense_layers: layers that run one dense MLP of `dense_hidden` channels instead of experts.
        shared_hidden: hidden channels that run for every token beside the routed experts, 0 for
            none; `shared_experts` says of how many experts the checkpoint counts them.
        qk_norm: norms on queries and keys: none, one gain per channel of a head, or of all heads.
        rope: which channels of a head rotate together: i with i + d/2, or 2i with 2i + 1.
        selection_bias: the router adds a bias to the scores for the selection.
        renormalize: weights are divided by max(their sum, routing_epsilon).
    """

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
    rope: Literal["half", "interleaved"] = "half"
    selection_bias: bool = False
    dense_layers: frozenset[int] = frozenset()
    dense_hidden: int = 0
    shared_hidden: int = 0
    shared_experts: int = 0
    elastic: ElasticBlock | None = None

    @property
    def width_granules(self) -> int:
        """Parts that an expert can be cut into: as the checkpoint says, else 8, else 1."""
        if self.elastic is not None:
            return self.elastic.width_granules
        return DEFAULT_GRANULES if self.expert_hidden % DEFAULT_GRANULES == 0 else 1

    @property
    def moe_layers(self) -> frozenset[int]:
        """Indices of the layers that route; the others have a dense MLP."""
        return frozenset(range(self.num_layers)) - self.dense_layers

    @cached_property
    def shape(self) -> ModelShape:
        """What sub-networks are resolved against."""
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
            moe_layers=self.moe_layers,
            width_granules=self.width_granules,
            dense_hidden=self.dense_hidden,
            shared_hidden=self.shared_hidden,
            qk_norm=self.qk_norm,
            tied_embeddings=self.tied_embeddings,
        )
