"""What is timed, and what is divided by what: with a clock and a model that are made up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from elastic_moe.engine import Engine
from elastic_moe.engine.running.runner import Chunk
from elastic_moe.lab.bench import speed
from elastic_moe.lab.bench.speed import measure_speed

IDS = list(range(1, 601))


def test_the_load_is_read_before_each_measurement(
    tiny: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    load = SimpleNamespace(read=lambda: events.append("load"))
    once = speed._time_once
    monkeypatch.setattr(speed, "_time_once", lambda *a: (events.append("time"), once(*a))[1])
    subnets = [tiny.resolve(name) for name in ("full", "k1")]
    list(measure_speed(tiny.runner, subnets, IDS, rounds=2, decode_tokens=1, load=load))
    assert events == ["time"] + ["load", "time"] * 4


def test_every_point_is_timed_on_its_own_subnetwork(
    tiny: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, int]] = []
    run = tiny.runner.run

    def watched(chunks: list[Chunk], **more: object):
        (chunk,) = chunks
        ran.append((chunk.sequence.subnet.name, len(chunk.token_ids)))
        return run(chunks, **more)

    monkeypatch.setattr(tiny.runner, "run", watched)
    subnets = [tiny.resolve(name) for name in ("full", "L2", "k1")]
    *_, (done, speeds) = measure_speed(tiny.runner, subnets, IDS, rounds=2, decode_tokens=3)
    assert (done, len(speeds)) == (6, 3)
    one_round = [(s.name, tokens) for s in subnets for tokens in (512, 64, 1, 1, 1)]
    assert ran[3:] == one_round * 2  # the first three warm up: prefill, context, one token


def test_speeds_are_tokens_over_the_median_time(
    tiny: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look at the clock takes the next time: a prefill's start and end, a decode's."""
    seconds = [9.0, 9.0]  # prefill and decode of the warm-up
    seconds += [4.0, 0.5, 2.0, 0.25, 1.0, 8.0]  # three rounds
    now, looks = 0.0, []
    for duration in seconds:
        looks += [now, now + duration]
        now += duration
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=iter(looks).__next__))
    subnet = tiny.resolve("L2")
    *_, (_, [(prefill, decode)]) = measure_speed(
        tiny.runner, [subnet], IDS, rounds=3, decode_tokens=3
    )
    assert prefill == (512 / 4.0, 512 / 2.0, 512 / 1.0)  # slowest, median, fastest round
    assert decode == (3 / 8.0, 3 / 0.5, 3 / 0.25)
