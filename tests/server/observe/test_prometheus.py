"""/metrics: the numbers are those of what happened, under the names that dashboards ask for."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from elastic_moe import Engine, SamplingParams
from elastic_moe.server.observe.access_record import AccessRecord
from elastic_moe.server.observe.metrics import MAX_SUBNETS, Histogram, Metrics
from elastic_moe.server.observe.prometheus import PrometheusExporter
from elastic_moe.server.routing.limits import Limits
from tests.server.conftest import Running, slow
from tests.server.observe.scraping import Scraped, read, scraped_when
from tests.server.raw import leave

GAUGES = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
}
COUNTERS = {
    "vllm:num_preemptions_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:request_success_total",
}
HISTOGRAMS = {
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:time_per_output_token_seconds",
    "vllm:request_time_per_output_token_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
    "vllm:request_inference_time_seconds",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
    "elastic_moe:time_to_first_token_seconds",
    "elastic_moe:inter_token_latency_seconds",
    "elastic_moe:queue_time_seconds",
    "elastic_moe:mean_experts",
}


@pytest.fixture
def fresh(start: Any) -> Running:
    return start()


def test_the_names_that_dashboards_ask_for_are_there_from_the_beginning(fresh: Running) -> None:
    answer = fresh.http.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    kinds: dict[str, set[str]] = {"gauge": set(), "counter": set(), "histogram": set()}
    for family in text_string_to_metric_families(answer.text):
        if family.type in kinds:
            kinds[family.type].add(family.name)
        assert family.documentation
        if family.name.startswith("vllm:"):
            assert family.samples
            for sample in family.samples:
                assert sample.labels["model_name"] == "tiny"
    assert kinds["gauge"] >= GAUGES
    assert kinds["counter"] >= {name.removesuffix("_total") for name in COUNTERS}
    assert kinds["histogram"] == HISTOGRAMS
    samples = read(answer.text)
    about = {"version": "0.1.0", "backend": fresh.engine.backend, "dtype": "float32"}
    assert samples["elastic_moe:server_info", frozenset(about.items())] == 1
    assert samples["elastic_moe:queue_limit", frozenset()] == fresh.engine.engine_config.max_queue
    assert samples["process_resident_memory_bytes", frozenset()] > 1e6


def test_numbers_are_those_of_the_answers(fresh: Running) -> None:
    """Whole or streamed, several choices or prompts: the counts that clients got add up."""
    long = list(range(100, 140))
    usages, experts = [], []
    for body in (
        {"prompt": [5, 6, 7], "max_tokens": 9},
        {"prompt": long, "max_tokens": 4, "routing_config": {"depth": 3}},
        {"prompt": long, "max_tokens": 4, "routing_config": {"depth": 3, "top_k": 1}},
        {"prompt": long, "max_tokens": 1, "routing_config": {"depth": 3}},
        {"prompt": [5, 6, 7], "max_tokens": 3, "n": 2, "temperature": 1.0, "seed": 1},
    ):
        done = fresh.complete(ignore_eos=True, **body)
        usages.append(done["usage"])
        experts.append(done["routing"]["mean_experts"])
    two = fresh.complete([[5, 6], [7, 8, 9]], max_tokens=2, ignore_eos=True)
    usages.append(two["usage"])
    chat = fresh.openai.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=6,
        stream=True,
        stream_options={"include_usage": True},
        logit_bias={"20": 100},
    )
    usages.append(list(chat)[-1].usage.model_dump())  # type: ignore[union-attr]
    brief = {"model": "tiny", "prompt": [5], "max_tokens": 2, "ignore_eos": True, "stream": True}
    text = fresh.post("/v1/completions", **brief)
    assert text.text.endswith("data: [DONE]\n\n")
    usages.append({"prompt_tokens": 1, "completion_tokens": 2})
    # Log-probabilities of a prompt are not cached, so the cache is not asked for it.
    echo = {"prompt": long, "max_tokens": 1, "echo": True, "logprobs": 0}
    usages.append(fresh.complete(ignore_eos=True, **echo)["usage"])

    ended = {"endpoint": "/v1/completions", "status": "200"}
    reported = scraped_when(
        fresh, lambda reported: reported("elastic_moe:http_responses_total", **ended) == 8
    )
    prompts = sum(usage["prompt_tokens"] for usage in usages)
    written = sum(usage["completion_tokens"] for usage in usages)
    found = sum(
        (u.get("prompt_tokens_details") or {"cached_tokens": 0})["cached_tokens"] for u in usages
    )
    assert found > 0
    for family in ("vllm", "elastic_moe"):
        assert reported(f"{family}:prompt_tokens_total") == prompts
        assert reported(f"{family}:generation_tokens_total") == written
    assert reported("vllm:prefix_cache_queries_total") == prompts - len(long)
    assert reported("vllm:prefix_cache_hits_total") == found
    assert reported("vllm:request_success_total", finished_reason="length") == 10
    assert reported("vllm:request_success_total", finished_reason="stop") == 0
    assert reported("vllm:request_success_total", finished_reason="abort") == 0
    assert reported("vllm:request_prompt_tokens_sum") == prompts
    assert reported("vllm:request_prompt_tokens_bucket", le="2.0") == 2
    assert reported("vllm:request_generation_tokens_sum") == written
    # [3 + 3] tokens of two choices are one generation, and have two pauses in the first.
    pauses = 8 + 3 + 3 + 0 + 2 + (1 + 1) + 5 + 1
    for name in ("vllm:inter_token_latency", "vllm:time_per_output_token"):
        assert reported(f"{name}_seconds_count") == pauses
    assert reported("vllm:request_time_per_output_token_seconds_count") == 8
    assert reported("elastic_moe:mean_experts_count") == 10
    rest = reported("elastic_moe:mean_experts_sum") - sum(
        experts
    )  # of the last five: all that there are
    assert rest == pytest.approx(5 * fresh.engine.shape.max_top_k)
    assert reported("elastic_moe:requests_total", subnet="full") == 6
    assert reported("elastic_moe:requests_total", subnet="L3") == 2
    assert reported("elastic_moe:requests_total", subnet="L3-k1") == 1
    ended["endpoint"] = "/v1/chat/completions"
    assert reported("elastic_moe:http_responses_total", **ended) == 1


def test_times_fit_together(fresh: Running) -> None:
    begun = time.perf_counter()
    for tokens in (1, 2, 50):
        fresh.complete([5, 6, 7], max_tokens=tokens, ignore_eos=True)
    spent = time.perf_counter() - begun
    reported = Scraped(fresh)

    def total(name: str) -> float:
        assert (
            reported(f"{name}_seconds_count") == reported(f"{name}_seconds_bucket", le="+Inf") == 3
        )
        return reported(f"{name}_seconds_sum")

    first = total("vllm:time_to_first_token")
    whole = total("vllm:e2e_request_latency")
    queued, prefill = total("vllm:request_queue_time"), total("vllm:request_prefill_time")
    decode = total("vllm:request_decode_time")
    assert 0 < queued < first < whole < spent
    assert first == pytest.approx(queued + prefill)
    assert whole == pytest.approx(first + decode)
    assert total("vllm:request_inference_time") == pytest.approx(prefill + decode)
    assert reported("vllm:inter_token_latency_seconds_count") == 1 + 49
    assert reported("vllm:inter_token_latency_seconds_sum") == pytest.approx(decode)
    assert reported("vllm:request_time_per_output_token_seconds_count") == 2


def test_a_wait_for_its_turn_is_queue_time(start: Any) -> None:
    narrow = start(max_num_seqs=1)
    slow(narrow.engine)
    first = narrow.engine.stream([5], None, SamplingParams(max_tokens=40, ignore_eos=True))
    next(first)
    begun = time.perf_counter()
    narrow.complete([5, 6, 7], max_tokens=2, ignore_eos=True)
    waited = time.perf_counter() - begun
    reported = Scraped(narrow)
    assert reported("vllm:request_queue_time_seconds_count") == 1
    assert waited / 2 < reported("vllm:request_queue_time_seconds_sum") < waited
    first.close()  # type: ignore[attr-defined]


def test_the_engine_is_told_as_it_is_when_it_is_asked(start: Any) -> None:
    busy = start(max_num_seqs=2)
    streams = [
        busy.engine.stream([5, i], None, SamplingParams(max_tokens=600, ignore_eos=True))
        for i in range(3)
    ]
    reported = scraped_when(busy, lambda reported: reported("vllm:num_requests_running") == 2)
    assert reported("vllm:num_requests_waiting") == reported("elastic_moe:requests_waiting") == 1
    assert reported("elastic_moe:requests_unfinished") == 3
    used, blocks = reported("elastic_moe:kv_blocks_used"), reported("elastic_moe:kv_blocks")
    assert used >= 2 * busy.engine.shape.num_layers
    assert blocks == busy.engine.stats().num_blocks
    assert reported("vllm:kv_cache_usage_perc") == used / blocks
    for own in streams:
        own.close()  # type: ignore[attr-defined]
    busy.idle()
    reported, stats = Scraped(busy), busy.engine.stats()
    assert reported("elastic_moe:engine_steps_total") == stats.steps > 0
    assert reported("vllm:generation_tokens_total") == stats.written_tokens > 0
    assert reported("vllm:kv_cache_usage_perc") == 0


def test_blocks_that_run_out_are_told(start: Any, tiny: Engine) -> None:
    """Two texts of 500 tokens, where one and a half have room."""
    blocks = 48 * tiny.shape.num_layers
    small = start(kv_cache_bytes=blocks * tiny.runner.block_bytes)
    small.complete([[5], [6]], max_tokens=500, ignore_eos=True)
    reported, stats = Scraped(small), small.engine.stats()
    assert reported("elastic_moe:kv_blocks") == blocks
    for family in ("vllm:num_preemptions", "elastic_moe:preemptions"):
        assert reported(f"{family}_total") == stats.preemptions > 0
    assert reported("elastic_moe:evicted_pages_total") == stats.evicted_pages > 0
    assert reported("vllm:generation_tokens_total") == 1000  # none of them twice
    assert reported("vllm:prompt_tokens_total") == 2
    # The second began long before it was put back.
    assert reported("vllm:request_prefill_time_seconds_sum") > 0


def test_a_request_is_counted_under_what_it_got_rather_than_what_it_asked_for(start: Any) -> None:
    shallow = start({"limits": Limits(depth=(None, 3))})
    shallow.complete(max_tokens=1)
    reported = Scraped(shallow)
    assert reported("elastic_moe:requests_total", subnet="L3") == 1
    assert reported("elastic_moe:requests_total", subnet="full") == 0


def test_a_client_that_goes_is_counted_and_what_it_left_behind(fresh: Running) -> None:
    for stream in (True, False):
        leave(fresh, stream=stream)
    fresh.idle()
    reported = scraped_when(
        fresh, lambda reported: reported("elastic_moe:disconnected_clients_total") == 2
    )
    assert reported("vllm:request_success_total", finished_reason="abort") == 2
    assert reported("vllm:generation_tokens_total") >= 2 * 19
    assert reported("vllm:time_to_first_token_seconds_count") == 0  # nobody waited to the end
    assert reported("elastic_moe:requests_total", subnet="full") == 2
    statuses = {"200", "499"}
    for status in statuses:
        path = "/v1/completions"
        assert reported("elastic_moe:http_responses_total", endpoint=path, status=status) == 1


def test_answers_are_counted_by_endpoint_and_status_and_clients_name_neither(
    start: Any,
) -> None:
    keyed = start({"api_keys": ("key",)}, max_queue=1)
    for path in ("/v1/models", "/v1/models/tiny", "/v1/models/secret-1", "/secret-2"):
        keyed.http.get(path)
    keyed.http.get("/v1/models", headers={"authorization": "Bearer secret-3"})
    keyed.http.get("/secret-4", headers={"authorization": ""})
    keyed.http.delete("/v1/models?secret-5")
    keyed.complete("secret-6", max_tokens=1)
    keyed.refused(400, prompt="secret-7", max_tokens=-1)
    keyed.post("/v1/embeddings", model="tiny", input="secret-8")
    held = keyed.engine.stream([5], None, SamplingParams(max_tokens=500))
    keyed.refused(429)
    held.close()  # type: ignore[attr-defined]
    answer = keyed.http.get("/metrics", headers={"authorization": ""})  # open, as /health
    assert "secret" not in answer.text.lower()
    counted = {
        (dict(labels)["endpoint"], dict(labels)["status"]): value
        for (name, labels), value in read(answer.text).items()
        if name == "elastic_moe:http_responses_total"
    }
    assert counted == {
        ("/v1/models", "200"): 1,
        ("/v1/models", "401"): 1,
        ("/v1/models", "405"): 1,
        ("/v1/models/{model}", "200"): 1,
        ("/v1/models/{model}", "404"): 1,
        ("other", "404"): 1,
        ("other", "401"): 1,
        ("/v1/completions", "200"): 1,
        ("/v1/completions", "400"): 1,
        ("/v1/completions", "429"): 1,
        ("/v1/embeddings", "200"): 1,
    }
    reported = Scraped(keyed)
    assert reported("elastic_moe:rejected_requests_total") == 1
    assert reported("elastic_moe:http_responses_total", endpoint="/metrics", status="200") == 1
    # The completion, the embedding, and the one that was refused once its sub-network was known.
    assert reported("elastic_moe:requests_total", subnet="full") == 3


def test_a_stream_that_breaks_is_counted(fresh: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(*_: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(type(fresh.server.app.state.service), "applied", faulty)
    body = {"prompt": "The", "max_tokens": 3, "ignore_eos": True, "stream": True}
    answer = fresh.post("/v1/completions", model="tiny", **body)
    events = answer.text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["error"]["type"] == "server_error"
    scraped_when(fresh, lambda reported: reported("elastic_moe:broken_answers_total") == 1)


def test_names_of_sub_networks_do_not_grow_without_end() -> None:
    metrics = Metrics()
    for _ in range(2):
        for number in range(MAX_SUBNETS + 50):
            metrics.observe(AccessRecord(subnet=f"x{number:08x}", status=200))
    assert len(metrics.subnets) == MAX_SUBNETS + 1
    assert metrics.subnets["x00000000"] == 2
    assert metrics.subnets["other"] == 100


def test_servers_in_one_process_count_for_themselves(start: Any) -> None:
    one, other = start(), start()
    one.complete(max_tokens=3, ignore_eos=True)
    assert Scraped(one)("vllm:generation_tokens_total") == 3
    assert Scraped(other)("vllm:generation_tokens_total") == 0
    assert Scraped(other)("vllm:time_to_first_token_seconds_count") == 0


def test_an_engine_that_is_closed_leaves_the_numbers_of_the_requests(tiny_folder: Any) -> None:
    engine, metrics = Engine.from_pretrained(tiny_folder), Metrics()
    metrics.observe(AccessRecord(endpoint="/x", status=503))
    exporter = PrometheusExporter(engine, metrics)
    assert "vllm:num_requests_running" in exporter.text().decode()
    engine.close()
    reported = read(exporter.text().decode())
    answered = frozenset({("endpoint", "/x"), ("status", "503")})
    assert reported["elastic_moe:http_responses_total", answered] == 1
    assert not any(name == "vllm:num_requests_running" for name, _ in reported)


def test_a_histogram_counts_a_value_at_its_bound_and_many_at_once() -> None:
    histogram = Histogram((1.0, 2.0, 4.0))
    for value, times in ((1.0, 1), (1.5, 10), (2.0, 1), (9.0, 3)):
        histogram.observe(value, times)
    assert histogram.buckets() == [("1.0", 1), ("2.0", 12), ("4.0", 12), ("+Inf", 15)]
    assert math.isclose(histogram.sum, 1 + 15 + 2 + 27)
