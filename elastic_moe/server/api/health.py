"""GET /health and /ready."""

from __future__ import annotations

from fastapi import FastAPI, Response

from elastic_moe.server.errors import ApiError
from elastic_moe.server.service import Service


def add_endpoints(app: FastAPI, service: Service) -> None:
    """Add the endpoints of this module to the application."""

    @app.get("/health", response_class=Response)
    async def health() -> Response:
        """200 as long as the engine runs."""
        service.engine.stats()
        return Response()

    @app.get("/ready", response_class=Response)
    async def ready() -> Response:
        """200 as long as the server accepts requests."""
        if not service.ready:
            raise ApiError(503, "the server is ending.", code="not_ready")
        return Response()
