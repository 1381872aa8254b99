"""Places of the queue: full when it can be, in turn, and a list never refused for its length."""

from __future__ import annotations

from typing import Any

import pytest

from elastic_moe.engine.scheduling.admission import Admission, Call
from elastic_moe.errors import QueueFullError


def call_of(name: str, count: int) -> Call:
    requests: Any = [f"{name}{i}" for i in range(count)]
    return Call(requests)


def test_a_single_request_enters_until_the_queue_is_full() -> None:
    places = Admission(max_queue=2, max_per_call=2)
    for name in "ab":
        assert places.accept(call_of(name, 1)) == [f"{name}0"]
    with pytest.raises(QueueFullError, match="2 requests are unfinished, and max_queue is 2"):
        places.accept(call_of("c", 1))
    assert places.leave("a0") == []  # type: ignore[arg-type]
    assert places.accept(call_of("c", 1)) == ["c0"]
    assert places.unfinished == 2


def test_a_list_enters_whenever_any_place_is_free() -> None:
    places = Admission(max_queue=3, max_per_call=3)
    assert places.accept(call_of("a", 6)) == ["a0", "a1", "a2"]
    assert places.leave("a2") == ["a3"]  # type: ignore[arg-type]
    assert places.leave("a1") == ["a4"]  # type: ignore[arg-type]
    assert places.leave("a3") == ["a5"]  # type: ignore[arg-type]
    assert places.leave("a0") == []  # type: ignore[arg-type]
    assert places.unfinished == 2
    with pytest.raises(QueueFullError):
        Admission(0, 0).accept(call_of("b", 9))


def test_a_list_leaves_places_to_others_and_lists_take_turns() -> None:
    places = Admission(max_queue=5, max_per_call=2)
    assert places.accept(call_of("a", 4)) == ["a0", "a1"]
    assert places.accept(call_of("b", 4)) == ["b0", "b1"]
    assert places.accept(call_of("c", 3)) == ["c0"]
    assert places.leave("a0") == ["a2"]  # type: ignore[arg-type]
    assert places.leave("b0") == ["b2"]  # type: ignore[arg-type]
    assert places.leave("c0") == ["c1"]  # type: ignore[arg-type]
    assert places.leave("a1") == ["a3"]  # type: ignore[arg-type]
    assert places.leave("a2") == ["c2"]  # type: ignore[arg-type]
    assert places.leave("c1") == []  # type: ignore[arg-type]  # b has its share
    assert places.leave("b1") == ["b3"]  # type: ignore[arg-type]
    assert places.unfinished == 4


def test_a_call_that_is_withdrawn_gives_up_its_turn() -> None:
    places = Admission(max_queue=1, max_per_call=1)
    first, second = call_of("a", 3), call_of("b", 1)
    assert places.accept(first) == ["a0"]
    places.withdraw(first)
    places.withdraw(first)
    assert places.leave("a0") == []  # type: ignore[arg-type]
    assert places.accept(second) == ["b0"]
    assert places.withdraw_all() == []
    assert places.leave("b0") == []  # type: ignore[arg-type]
    assert (places.unfinished, len(places._turns), len(places._call_of)) == (0, 0, 0)


def test_all_that_wait_can_be_dropped_at_once() -> None:
    places = Admission(max_queue=2, max_per_call=1)
    places.accept(call_of("a", 3))
    places.accept(call_of("b", 2))
    assert places.withdraw_all() == ["a1", "a2", "b1"]
    assert places.leave("a0") == places.leave("b0") == []  # type: ignore[arg-type]


def test_an_empty_list_needs_no_place() -> None:
    places = Admission(max_queue=1, max_per_call=1)
    places.accept(call_of("a", 1))
    assert places.accept(call_of("b", 0)) == []
