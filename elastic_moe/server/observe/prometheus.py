"""The text of /metrics, for Prometheus.

Metrics named `vllm:*` mean what vLLM's mean, so that dashboards made for vLLM work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from elastic_moe import __version__
from elastic_moe.engine import Engine
from elastic_moe.engine.stats import EngineStats
from elastic_moe.errors import EngineError
from elastic_moe.server.observe.metrics import Histogram, Metrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# field of EngineStats -> names, help
_GAUGES = {
    "running": (
        ("vllm:num_requests_running", "elastic_moe:requests_running"),
        "Choices that the engine generates now.",
    ),
    "waiting": (
        ("vllm:num_requests_waiting", "elastic_moe:requests_waiting"),
        "Choices that wait in the engine's queue.",
    ),
    "unfinished": (
        ("elastic_moe:requests_unfinished",),
        "Requests that the engine has accepted and not finished.",
    ),
    "num_blocks": (
        ("elastic_moe:kv_blocks",),
        "Blocks of keys and values, of 16 tokens in one layer.",
    ),
    "used_blocks": (("elastic_moe:kv_blocks_used",), "Blocks that requests hold."),
}
_COUNTERS = {
    "preemptions": (
        ("vllm:num_preemptions", "elastic_moe:preemptions"),
        "Choices put back into the queue because blocks ran out.",
    ),
    "evicted_pages": (
        ("elastic_moe:evicted_pages",),
        "Pages of cached prefixes evicted for others.",
    ),
    "steps": (("elastic_moe:engine_steps",), "Steps of the engine."),
    "prompt_tokens": (
        ("vllm:prompt_tokens", "elastic_moe:prompt_tokens"),
        "Prompt tokens processed, for generation.",
    ),
    "written_tokens": (
        ("vllm:generation_tokens", "elastic_moe:generation_tokens"),
        "Tokens generated, for cancelled requests too.",
    ),
    "searched_tokens": (
        ("vllm:prefix_cache_queries",),
        "Prompt tokens looked up in the prefix cache.",
    ),
    "found_tokens": (("vllm:prefix_cache_hits",), "Prompt tokens found in the prefix cache."),
}
# field of Metrics -> names, help
_BETWEEN = "The mean of each generation, counted once per pause"
_HISTOGRAMS = {
    "ttft": (
        ("vllm:time_to_first_token_seconds", "elastic_moe:time_to_first_token_seconds"),
        "From the call to the first token.",
    ),
    "itl": (
        (
            "vllm:inter_token_latency_seconds",
            "vllm:time_per_output_token_seconds",
            "elastic_moe:inter_token_latency_seconds",
        ),
        f"Between two tokens. {_BETWEEN}.",
    ),
    "tpot": (
        ("vllm:request_time_per_output_token_seconds",),
        "Between two tokens: the mean of each generation.",
    ),
    "e2e": (("vllm:e2e_request_latency_seconds",), "From the call to the last token."),
    "queue": (
        ("vllm:request_queue_time_seconds", "elastic_moe:queue_time_seconds"),
        "From the call to the first step of the engine.",
    ),
    "prefill": (
        ("vllm:request_prefill_time_seconds",),
        "From the first step of the engine to the first token.",
    ),
    "decode": (("vllm:request_decode_time_seconds",), "From the first token to the last."),
    "inference": (
        ("vllm:request_inference_time_seconds",),
        "From the first step of the engine to the last token.",
    ),
    "prompt_tokens": (("vllm:request_prompt_tokens",), "Tokens per prompt."),
    "completion_tokens": (
        ("vllm:request_generation_tokens",),
        "Tokens generated per prompt, in all choices.",
    ),
    "mean_experts": (
        ("elastic_moe:mean_experts",),
        "Experts that ran per token and MoE layer: the mean of each generation.",
    ),
}


class PrometheusExporter(Collector):
    """Collects the metrics of one server and its engine.

    Attributes:
        registry: this server's own, as one process may run several.
    """

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self._engine, self._metrics = engine, metrics
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def text(self) -> bytes:
        """The body of /metrics."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """All metrics; called by the registry."""
        model = {"model_name": self._engine.name}
        with suppress(EngineError):  # closed, while the last responses are sent
            yield from _of_engine(self._engine.stats(), model)
        yield from self._of_requests(model)
        for field, (names, description) in _HISTOGRAMS.items():
            yield from _histograms(names, description, getattr(self._metrics, field), model)
        about = {**model, "version": __version__, "backend": self._engine.backend}
        info = InfoMetricFamily("elastic_moe:server", "Model, backend and version of this server.")
        info.add_metric((), {**about, "dtype": self._engine.dtype})
        yield info

    def _of_requests(self, model: Mapping[str, str]) -> Iterator[Metric]:
        metrics = self._metrics
        yield _counter(
            "vllm:request_success",
            "Generations that ended, by reason; abort: cancelled by a disconnect or a timeout.",
            [({**model, "finished_reason": why}, n) for why, n in metrics.finished.items()],
        )
        yield _counter(
            "elastic_moe:requests",
            "Requests by sub-network; 'other' counts all names after the first 100.",
            [({**model, "subnet": name}, n) for name, n in metrics.subnets.items()],
            ("model_name", "subnet"),
        )
        yield _counter(
            "elastic_moe:http_responses",
            "Responses by endpoint and status; 499: the client disconnected.",
            [({"endpoint": e, "status": str(s)}, n) for (e, s), n in metrics.responses.items()],
            ("endpoint", "status"),
        )
        yield _counter(
            "elastic_moe:timeouts",
            "Requests beyond a time limit; read: of the body, request: of the whole request.",
            [({"limit": limit}, n) for limit, n in metrics.timeouts.items()],
        )
        for name, description, value in (
            ("rejected_requests", "Requests answered 429.", metrics.rejected),
            (
                "disconnected_clients",
                "Requests whose client disconnected early.",
                metrics.disconnected,
            ),
            ("broken_answers", "Responses that started and ended with an error.", metrics.failed),
        ):
            yield _counter(f"elastic_moe:{name}", description, [({}, value)])
        yield _gauge(
            "elastic_moe:queue_limit",
            "Unfinished requests allowed; more are answered 429.",
            self._engine.engine_config.max_queue,
            model,
        )


def _of_engine(stats: EngineStats, model: Mapping[str, str]) -> Iterator[Metric]:
    for field, (names, description) in _GAUGES.items():
        for name in names:
            yield _gauge(name, description, getattr(stats, field), model)
    for field, (names, description) in _COUNTERS.items():
        for name in names:
            yield _counter(name, description, [(model, getattr(stats, field))])
    yield _gauge(
        "vllm:kv_cache_usage_perc",
        "Share of the blocks that requests hold; 1 is all of them.",
        stats.used_blocks / stats.num_blocks,
        model,
    )


def _gauge(name: str, description: str, value: float, labels: Mapping[str, str]) -> Metric:
    family = GaugeMetricFamily(name, description, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _counter(
    name: str,
    description: str,
    values: list[tuple[Mapping[str, str], int]],
    labels: Iterable[str] | None = None,
) -> Metric:
    """Args: labels: their names, where there may be no value yet."""
    named = list(labels if labels is not None else values[0][0])
    family = CounterMetricFamily(name, description, labels=named)
    for own, value in values:
        family.add_metric([own[label] for label in named], value)
    return family


def _histograms(
    names: Iterable[str], description: str, histogram: Histogram, labels: Mapping[str, str]
) -> Iterator[Metric]:
    for name in names:
        family = HistogramMetricFamily(name, description, labels=list(labels))
        family.add_metric(list(labels.values()), histogram.buckets(), histogram.sum)
        yield family
