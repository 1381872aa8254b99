"""What an engine tells about itself: one step, and how busy it is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step ran.

    Attributes:
        parts: (request's number, choice, tokens) of everything that shared it.
        preempted: (request's number, choice) of what was put back before it.
    """

    parts: tuple[tuple[int, int, int], ...]
    preempted: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """How busy the engine is, at a moment.

    Attributes:
        unfinished: requests that were taken in and have not ended.
        running, waiting: choices of requests.
        used_blocks, num_blocks: blocks of keys and values that somebody holds, and all.
        preemptions, evicted_pages, steps: since the engine began.
        prompt_tokens, written_tokens: that were read and written since then, also for requests that
            were cancelled later.
        searched_tokens, found_tokens: of prompts, those that the prefix cache was asked for, and
            those that it had.
    """

    unfinished: int
    running: int
    waiting: int
    used_blocks: int
    num_blocks: int
    preemptions: int
    evicted_pages: int
    steps: int
    prompt_tokens: int
    written_tokens: int
    searched_tokens: int
    found_tokens: int
