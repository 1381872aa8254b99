"""The application as a whole: its OpenAPI description."""

from __future__ import annotations

from pathlib import Path

from fastapi.routing import APIRoute
from pydantic import BaseModel

from elastic_moe import protocol
from tests.server.conftest import Running


def test_the_description_is_what_is_served(served: Running) -> None:
    reported = served.http.get("/openapi.json").json()
    assert set(reported["paths"]) >= {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/tokenize",
    }
    for path, operations in reported["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"], path
            error = operation["responses"]["400"]["content"]["application/json"]["schema"]
            assert error["$ref"].endswith("/ErrorResponse")
    changes = reported["paths"]["/admin/profiles/{name}"]["put"]["responses"]
    assert {"200", "201", "400", "409", "412"} <= set(changes)
    knobs = reported["components"]["schemas"]["RoutingConfig"]
    assert {"top_k", "topK", "routingTopK", "activeLayers"} <= set(knobs["properties"])
    assert knobs["additionalProperties"] is False


def test_the_page_lists_every_path(served: Running) -> None:
    page = (Path(__file__).parents[2] / "docs" / "server.md").read_text(encoding="utf-8")
    for path in served.http.get("/openapi.json").json()["paths"]:
        base = path.split("/{")[0]
        assert f"`{base}`" in page, f"docs/server.md says nothing of {path}"


def test_bodies_and_answers_can_be_imported_from_the_protocol(served: Running) -> None:
    """Those below /admin/ alone are in a module of their own."""
    types: set[type[BaseModel]] = set()
    for route in served.server.app.routes:
        if isinstance(route, APIRoute) and not route.path.startswith("/admin/"):
            fields = [route.body_field, *route.response_fields.values(), route.response_field]
            types |= {field.field_info.annotation for field in fields if field is not None}
    own = {one.__name__ for one in types if one.__module__.startswith("elastic_moe.protocol")}
    assert {"ChatRequest", "ChatCompletion", "TokenizerInfo", "ErrorResponse"} <= own
    assert own <= set(protocol.__all__), "import it in elastic_moe/protocol/__init__.py"
