"""The sizes of a model that the elastic axes and the cost formulas need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from elastic_moe.errors import RoutingError


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a model has.

    Attributes:
        max_top_k: K, the experts per token of the full network.
        expert_hidden: F, hidden channels of each expert, in `width_granules` equal granules (G).
        moe_layers: layers that route; the others run a dense MLP of `dense_hidden` channels.
        shared_hidden: hidden channels of the experts that every token runs (0 without).
        qk_norm: norms on queries and keys: none, one gain per channel of a head, or of all heads.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    num_experts: int
    max_top_k: int
    expert_hidden: int
    moe_layers: frozenset[int]
    width_granules: int = 1
    dense_hidden: int = 0
    shared_hidden: int = 0
    qk_norm: Literal["none", "head", "all"] = "none"
    tied_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.width_granules < 1 or self.expert_hidden % self.width_granules:
            raise RoutingError(
                f"width_granules must divide the expert hidden size {self.expert_hidden}, "
                f"got {self.width_granules}. Use 1 for experts that cannot be sliced."
            )

    @property
    def channels_per_granule(self) -> int:
        return self.expert_hidden // self.width_granules

    @property
    def qk_channels(self) -> int:
        """Channels of all query and key heads."""
        return (self.num_heads + self.num_kv_heads) * self.head_dim

    @property
    def attention_params(self) -> int:
        """Projections and norms of one layer's attention."""
        gains = {"none": 0, "head": 2 * self.head_dim, "all": self.qk_channels}[self.qk_norm]
        return 2 * self.hidden_size * self.qk_channels + gains

    @property
    def total_params(self) -> int:
        """Parameters that the checkpoint stores."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        total = embeddings + self.hidden_size
        for layer in range(self.num_layers):
            mlp = 3 * self.hidden_size * self.dense_hidden
            if layer in self.moe_layers:
                routed = self.num_experts * (3 * self.expert_hidden + 1)  # the router's row is 1
                mlp = self.hidden_size * (routed + 3 * self.shared_hidden)
            total += self.attention_params + 2 * self.hidden_size + mlp
        return total
