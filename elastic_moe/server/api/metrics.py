"""GET /metrics, for Prometheus."""

from __future__ import annotations

from fastapi import FastAPI, Response

from elastic_moe.server.observe.prometheus import CONTENT_TYPE, PrometheusExporter
from elastic_moe.server.service import Service


def add_endpoints(app: FastAPI, service: Service) -> None:
    """Add the endpoint of this module to the application."""
    exporter = PrometheusExporter(service.engine, service.metrics)

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        """Counters, gauges and histograms in Prometheus' text format."""
        return Response(exporter.text(), headers={"content-type": CONTENT_TYPE})
