"""GET /v1/models and /v1/models/{model}."""

from __future__ import annotations

from fastapi import FastAPI

from elastic_moe.protocol.models import ElasticAxes, ModelCard, ModelList
from elastic_moe.server.service import Service


def add_endpoints(app: FastAPI, service: Service) -> None:
    """Add the endpoints of this module to the application."""

    @app.get("/v1/models")
    async def models() -> ModelList:
        """The names that requests may ask for."""
        return ModelList(data=[model_card(service, name) for name in service.routing.names])

    @app.get("/v1/models/{model}")
    async def model(model: str) -> ModelCard:
        """One of them."""
        service.check_model(model)
        return model_card(service, model)


def model_card(service: Service, name: str) -> ModelCard:
    """The model under one of its names, with the range of each elastic axis."""
    config, shape = service.engine.config, service.engine.shape
    trained = {} if config.elastic is None else config.elastic.trained
    return ModelCard(
        id=name,
        created=service.created,
        root=service.engine.name,
        max_model_len=config.max_positions,
        elastic=ElasticAxes(
            max_depth=shape.num_layers,
            max_top_k=shape.max_top_k,
            num_experts=shape.num_experts,
            width_granules=shape.width_granules,
            trained={axis: list(values) for axis, values in trained.items()},
            profiles=list(service.routing.profiles.all()),
        ),
    )
