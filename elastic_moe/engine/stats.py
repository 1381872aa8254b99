"""Records of the engine: one step, and its load."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step.

    Attributes:
        parts: (request's number, choice, tokens) of every sequence that runs.
        preempted: (request's number, choice) of every sequence that lost its blocks.
    """

    parts: tuple[tuple[int, int, int], ...]
    preempted: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The load of the engine at one moment.

    Attributes:
        unfinished: requests in the queue: accepted, admitted and not ended.
        running, waiting: sequences, one for each choice of a request.
        used_blocks, num_blocks: blocks of keys and values that sequences hold, and all.
        preemptions, evicted_pages, steps: since the engine started.
        prompt_tokens, written_tokens: computed and generated since then, also for requests that
            were cancelled later.
        searched_tokens, found_tokens: tokens of prompts that were looked up in the prefix cache,
            and those found.
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
