"""`assert_resilient` on clients that are right, and wrong in one way each."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import httpx2
import pytest
from openai import AsyncOpenAI, OpenAI

from elastic_moe.testing import ElasticMoEServer, NotResilientError, assert_resilient, findings
from elastic_moe.testing.findings import Finding
from elastic_moe.testing.resilience import scenarios
from tests.testing.clients import AskingA400Again, EasilyContent, Hasty, NeverAgain, RightClient

RETRY_AFTER = 0.3  # HTTP knows whole seconds; these clients take what they get
MESSAGES = [{"role": "user", "content": "Hello"}]


def found(server: ElasticMoEServer, call: Callable[[], Any], **options: Any) -> tuple[Finding, ...]:
    """What is wrong with a client."""
    try:
        assert_resilient(server, call, retry_after_seconds=RETRY_AFTER, **options)
    except NotResilientError as error:
        return error.findings
    return ()


def faults_in(reported: tuple[Finding, ...]) -> dict[str, list[str]]:
    """Fault -> the scenarios that show it."""
    table: dict[str, list[str]] = {}
    for one in reported:
        table.setdefault(one.fault, []).append(one.scenario)
    return table


@pytest.mark.parametrize(
    ("client", "expected"),
    [
        (RightClient, {}),
        (
            NeverAgain,
            {
                findings.NOT_RETRIED: [
                    "429 with Retry-After: 0.3, once",
                    "500, once",
                    "503, once",
                    "the connection closes before the stream, once",
                ]
            },
        ),
        (AskingA400Again, {findings.RETRIED: ["400", "401", "404", "422"]}),
        (Hasty, {findings.RETRY_AFTER: ["429 with Retry-After: 0.3, once"]}),
        (
            EasilyContent,
            {
                findings.TRUNCATED: [
                    "the stream breaks off, once",
                    "a part of the stream is missing, once",
                ]
            },
        ),
    ],
)
def test_a_client_has_its_own_fault_and_no_other(
    elastic_moe_server: ElasticMoEServer,
    client: type[RightClient],
    expected: dict[str, list[str]],
) -> None:
    with closing(client(elastic_moe_server)) as one:
        assert faults_in(found(elastic_moe_server, one.ask)) == expected


def test_every_scenario_strikes_as_it_says(elastic_moe_server: ElasticMoEServer) -> None:
    """And what the right client does about it, by the server's own record."""
    with closing(RightClient(elastic_moe_server)) as client:
        assert_resilient(elastic_moe_server, client.ask, retry_after_seconds=RETRY_AFTER)
    records = elastic_moe_server.requests
    reported = [(r.status, r.outcome) for r in records]
    whole, error = (200, "complete"), "error"
    assert reported[:9] == [
        whole,
        *((429, error), whole),
        *((500, error), whole),
        *((503, error), whole),
        *((reported[7][0], "truncated"), whole),  # no status went out
    ]
    assert reported[9:13] == [(status, error) for status in (400, 401, 404, 422)]
    assert reported[13:] == [*[(200, "truncated"), whole] * 2, *[(503, error)] * 3]
    assert [r.injected for r in records[13:16:2]] == [{"drop_after": 1}, {"malformed_after": 1}]


@pytest.mark.parametrize("stream", [False, True])
def test_the_client_of_openai_is_right(openai_env: ElasticMoEServer, stream: bool) -> None:
    """As it comes: two more attempts, after half a second and a second."""
    with OpenAI() as client:

        def ask() -> str:
            answer: Any = client.chat.completions.create(
                model="elastic-mini", messages=MESSAGES, max_tokens=6, stream=stream
            )
            if not stream:
                return answer.choices[0].message.content
            return "".join(chunk.choices[0].delta.content or "" for chunk in answer)

        without = ["500", "503"] if stream else []  # time; the other client was there
        assert_resilient(openai_env, ask, retry_after_seconds=RETRY_AFTER, without=without)
    assert {record.stream for record in openai_env.requests} == {stream}


def test_an_async_client_is_tested_too(openai_env: ElasticMoEServer) -> None:
    """All calls in one event loop, as a client that is made once may belong to it."""
    loops = set()

    async def ask() -> str:
        loops.add(asyncio.get_running_loop())
        async with AsyncOpenAI(max_retries=0) as client:
            answer = await client.completions.create(
                model="elastic-mini", prompt="The", max_tokens=4
            )
        return answer.choices[0].text

    only = ["500", "400", "cut", "lasting"]
    reported = found(openai_env, ask, only=only)
    assert faults_in(reported) == {findings.NOT_RETRIED: ["500, once"]}
    assert len(openai_env.requests) == 1 + len(only)
    (loop,) = loops
    assert loop.is_closed()


def test_the_message_tells_fault_scenario_and_requests(
    elastic_moe_server: ElasticMoEServer,
) -> None:
    with closing(NeverAgain(elastic_moe_server)) as client, pytest.raises(AssertionError) as caught:
        assert_resilient(elastic_moe_server, client.ask, only=["500", "400"])
    record = elastic_moe_server.requests[1]
    assert record.ended_seconds is not None
    seconds = record.ended_seconds - record.begun_seconds
    request = f"#{record.number} POST /v1/completions stream"
    assert str(caught.value).splitlines() == [
        "the client is not resilient:",
        "* it does not retry what is retryable",
        "    500, once: raised Failed: no answer: 500 after 1 request",
        f"      {request} -> 500, error after {seconds:.3f} s (injected: error 500)",
    ]


def plain(server: ElasticMoEServer, **body: Any) -> httpx2.Response:
    """One request, as it comes."""
    asked = {"model": "elastic-mini", "prompt": "The", "max_tokens": 1, **body}
    key = {"authorization": f"Bearer {server.api_key}"}
    return httpx2.post(f"{server.base_url}/completions", json=asked, headers=key, trust_env=False)


def until_it_works(server: ElasticMoEServer) -> str:
    while (answer := plain(server)).status_code != 200:
        time.sleep(0.01)
    return answer.text


def test_who_never_gives_up_is_told(elastic_moe_server: ElasticMoEServer) -> None:
    reported = found(
        elastic_moe_server, lambda: until_it_works(elastic_moe_server), only=["lasting"]
    )
    assert faults_in(reported) == {findings.ENDLESS: ["503, again and again"]}
    assert reported[0].seen == "had not given up after 10 requests"
    assert len(reported[0].records) == 11


def test_who_asks_a_400_for_ever_is_told_in_time(elastic_moe_server: ElasticMoEServer) -> None:
    """And is let go, so that the others can be tried."""
    call = lambda: until_it_works(elastic_moe_server)  # noqa: E731
    reported = found(elastic_moe_server, call, only=["400", "401"], max_seconds=0.3)
    assert faults_in(reported) == {findings.RETRIED: ["400", "401"]}
    assert "did not end within 0.3 s" in reported[0].seen


def test_who_returns_without_an_answer_is_told(elastic_moe_server: ElasticMoEServer) -> None:
    reported = found(
        elastic_moe_server, lambda: plain(elastic_moe_server).status_code, only=["429", "400"]
    )
    assert faults_in(reported) == {
        findings.SWALLOWED: ["429 with Retry-After: 0.3, once", "400"],
    }
    assert reported[1].seen == "returned 400 after 1 request"


def test_who_hangs_is_told_and_what_was_not_tried(
    elastic_moe_server: ElasticMoEServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elastic_moe.testing.resilience.LEAVE_SECONDS", 0.1)
    hanging = threading.Event()

    def ask() -> str:
        answer = plain(elastic_moe_server)
        if answer.status_code != 200:
            assert hanging.wait(60)
        return answer.text

    with pytest.raises(NotResilientError) as caught:
        assert_resilient(elastic_moe_server, ask, only=["500", "400", "cut"], max_seconds=0.3)
    hanging.set()
    assert caught.value.faults == (findings.ENDLESS,)
    assert "not tried, as it was still busy: 400, cut" in str(caught.value)


def test_a_call_that_works_never_is_no_finding(elastic_moe_server: ElasticMoEServer) -> None:
    def ask() -> None:
        plain(elastic_moe_server)
        raise KeyError("mine")

    with pytest.raises(
        AssertionError, match=r"nothing was wrong, but call\(\) raised KeyError"
    ) as e:
        assert_resilient(elastic_moe_server, ask)
    assert not isinstance(e.value, NotResilientError)
    assert isinstance(e.value.__cause__, KeyError)
    assert "POST /v1/completions -> 200, complete" in str(e.value)


def test_of_several_requests_one_is_named(elastic_moe_server: ElasticMoEServer) -> None:
    server = elastic_moe_server
    key = {"authorization": f"Bearer {server.api_key}"}

    def ask() -> str:
        httpx2.get(f"{server.base_url}/models", headers=key, trust_env=False).raise_for_status()
        return plain(server).raise_for_status().text

    with pytest.raises(AssertionError, match="must make one request to this server, it made 2"):
        assert_resilient(server, ask)
    reported = found(server, ask, path="/v1/completions", only=["500", "400"])
    assert faults_in(reported) == {findings.NOT_RETRIED: ["500, once"]}
    assert [record.path for record in reported[0].records] == ["/v1/completions"]


def test_faults_are_afterwards_what_they_were(
    elastic_moe_server: ElasticMoEServer, elastic_moe_faults: Any
) -> None:
    elastic_moe_faults.add(error=418, skip=5)
    with closing(RightClient(elastic_moe_server)) as client:
        assert_resilient(elastic_moe_server, client.ask, only=["500"])
    (rule,) = elastic_moe_faults.plan["rules"]
    assert (rule["error"], rule["skip"]) == (418, 5)


def test_an_unknown_scenario_is_an_error(elastic_moe_server: ElasticMoEServer) -> None:
    with pytest.raises(ValueError, match="no scenario '4xx'; there are 429, 500, "):
        assert_resilient(elastic_moe_server, lambda: None, without=["4xx"])
    assert not elastic_moe_server.requests


def test_it_works_inside_a_running_event_loop(elastic_moe_server: ElasticMoEServer) -> None:
    """As in a test of pytest-asyncio."""

    async def test() -> None:
        with closing(RightClient(elastic_moe_server)) as client:
            assert_resilient(elastic_moe_server, client.ask, only=["500"])

    asyncio.run(test())


def test_scenarios_have_the_names_that_the_documentation_gives() -> None:
    assert list(scenarios()) == [
        *("429", "500", "503", "dropped"),
        *("400", "401", "404", "422"),
        *("cut", "malformed", "lasting"),
    ]
