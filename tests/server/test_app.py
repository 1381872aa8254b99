"""The application as a whole: its OpenAPI description."""

from __future__ import annotations

from tests.server.conftest import Running


def test_the_description_is_what_is_served(served: Running) -> None:
    told = served.http.get("/openapi.json").json()
    assert set(told["paths"]) >= {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/tokenize",
    }
    for path, operations in told["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"], path
            error = operation["responses"]["400"]["content"]["application/json"]["schema"]
            assert error["$ref"].endswith("/ErrorResponse")
    changes = told["paths"]["/admin/profiles/{name}"]["put"]["responses"]
    assert {"200", "201", "400", "409", "412"} <= set(changes)
    knobs = told["components"]["schemas"]["RoutingConfig"]
    assert {"top_k", "topK", "routingTopK", "activeLayers"} <= set(knobs["properties"])
    assert knobs["additionalProperties"] is False
