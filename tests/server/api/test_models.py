"""/v1/models: names, limits and elastic axes."""

from __future__ import annotations

from typing import Any

from elastic_moe.engine import Engine
from tests.server.conftest import Running


def test_models_tell_names_limits_and_axes(served: Running) -> None:
    listed = served.openai.models.list().data
    assert [model.id for model in listed] == ["tiny", "ernie-5.1-prod"]
    card: Any = served.openai.models.retrieve("ernie-5.1-prod")
    shape = served.engine.shape
    assert (card.root, card.max_model_len) == ("tiny", served.engine.config.max_positions)
    assert card.elastic["max_depth"] == shape.num_layers
    assert card.elastic["max_top_k"] == shape.max_top_k
    assert card.elastic["num_experts"] == shape.num_experts
    assert card.elastic["width_granules"] == shape.width_granules
    assert served.http.get("/v1/models/gpt-4o").status_code == 404


def test_a_trained_model_tells_what_it_was_trained_for(mini: Engine) -> None:
    from elastic_moe.server.api.models import model_card
    from elastic_moe.server.service import Service
    from elastic_moe.server.settings import ServerSettings

    trained = model_card(Service.of(mini, ServerSettings()), "elastic-mini").elastic.trained
    assert trained["top_k"] == [1, 2, 3, 4]
