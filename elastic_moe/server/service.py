"""What all endpoints share: the engine, its names, and which sub-network a request means."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from elastic_moe.config import ElasticRoutingConfig
from elastic_moe.engine import Engine
from elastic_moe.engine.outputs import AppliedRouting, Usage
from elastic_moe.errors import RoutingError
from elastic_moe.protocol.models import ElasticAxes, ModelCard
from elastic_moe.protocol.routing import RoutingConfig
from elastic_moe.routing import Subnet
from elastic_moe.server.errors import ApiError
from elastic_moe.server.logprobs import LogprobWriter
from elastic_moe.server.settings import ServerSettings


@dataclass(slots=True)
class Service:
    """One engine behind a server.

    Attributes:
        created: when the server began, in seconds since 1970.
        default: the sub-network of requests that ask for none.
        logprobs: writes log-probabilities with the texts of their tokens.
        ready: whether requests are taken in.
    """

    engine: Engine
    settings: ServerSettings
    created: int
    default: Subnet
    logprobs: LogprobWriter
    ready: bool = True

    @classmethod
    def of(cls, engine: Engine, settings: ServerSettings) -> Service:
        """Raises: RoutingError: the model does not have the default sub-network."""
        default = engine.resolve(settings.routing)
        return cls(engine, settings, int(time.time()), default, LogprobWriter(engine.tokenizer))

    @property
    def names(self) -> tuple[str, ...]:
        """That requests may ask for."""
        return tuple(dict.fromkeys((self.engine.name, *self.settings.aliases)))

    @property
    def fingerprint(self) -> str:
        """Of what makes the answers: weights, kernels, numbers."""
        return f"em-{self.engine.backend}-{self.engine.dtype}"

    def resolve(self, model: str, config: RoutingConfig | None) -> Subnet:
        """The sub-network that a model's name and a `routing_config` mean.

        Raises:
            ApiError: no such model, or they mean different ones.
            RoutingError: the model has no such sub-network.
        """
        name, at, suffix = model.partition("@")
        if name not in self.names:
            raise ApiError(
                404,
                f"the model {model[:80]!a} does not exist; there are {', '.join(self.names)}.",
                param="model",
                code="model_not_found",
            )
        by_name = self.engine.resolve(suffix) if at else None
        if config is None:
            return by_name or self.default
        knobs = config.knobs(self.engine.shape.num_layers)
        by_config = self.engine.resolve(ElasticRoutingConfig.full(**knobs))
        if by_name is not None and by_name != by_config:
            raise RoutingError(
                f"the model's name asks for {by_name.name} and routing_config for "
                f"{by_config.name}. Ask in one place."
            )
        return by_config

    def card(self, name: str) -> ModelCard:
        """What the models endpoint tells of a name."""
        config, shape = self.engine.config, self.engine.shape
        trained = {} if config.elastic is None else config.elastic.trained
        return ModelCard(
            id=name,
            created=self.created,
            root=self.engine.name,
            max_model_len=config.max_positions,
            elastic=ElasticAxes(
                max_depth=shape.num_layers,
                max_top_k=shape.max_top_k,
                num_experts=shape.num_experts,
                width_granules=shape.width_granules,
                trained={axis: list(values) for axis, values in trained.items()},
            ),
        )

    def applied(self, subnet: Subnet, applied: AppliedRouting) -> dict[str, Any]:
        """`protocol.AppliedRouting` of a request that has ended."""
        active = [subnet.layers[i] for i in subnet.active_layers]
        routed = [layer for layer in active if layer.top_k] or active

        def axis(values: list[Any]) -> Any:
            return values[0] if all(value == values[0] for value in values) else values

        def pool(ids: tuple[int, ...]) -> int | list[int]:
            return len(ids) if ids == tuple(range(len(ids))) else list(ids)

        return {
            "name": applied.name,
            "model": self.engine.name,
            "depth": applied.depth,
            "active_layers": list(subnet.active_layers),
            "top_k": axis([layer.top_k for layer in routed]),
            "expert_width": axis([layer.width for layer in routed]),
            "sparsity": axis([layer.threshold for layer in routed]),
            "expert_pool": axis([pool(layer.pool) for layer in routed]),
            "min_experts": axis([layer.min_experts for layer in routed]),
            "active_params": applied.active_params,
            "flops_per_token": applied.flops_per_token,
            "mean_experts": applied.mean_experts,
        }


def usage(*parts: Usage) -> dict[str, Any]:
    """`protocol.Usage` of all prompts of a request."""
    read = sum(part.prompt_tokens for part in parts)
    written = sum(part.completion_tokens for part in parts)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": sum(part.cached_tokens for part in parts)},
    }
