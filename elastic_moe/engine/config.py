"""`EngineConfig`: how much an engine does at once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from elastic_moe_kernels.native import allowed_cores, default_threads

from elastic_moe.engine.running.runner import ModelRunner
from elastic_moe.engine.scheduling.block_manager import pages_for
from elastic_moe.engine.stats import StepRecord
from elastic_moe.errors import EngineError
from elastic_moe.routing.checks import as_index, shorten

FREE_BYTES = 4 << 30  # where the system does not say
FULL_CONTEXTS = 8  # of the whole network, that the cache holds by default


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How much an engine does at once. Names as in vLLM where it has them.

    Attributes:
        max_num_seqs: sequences that run in one step, at most.
        max_num_batched_tokens: tokens of one step, at most: a longer prompt takes several steps, in
            which others decode too.
        max_queue: requests that may be unfinished at once. Further calls are refused; a longer list
            enters request by request.
        kv_cache_bytes: of keys and values; None for eight full contexts of the whole network, or a
            quarter of the free memory, whichever is less. Memory is taken when it is first used.
        enable_prefix_caching: keep keys and values of requests that have ended, for prompts that
            begin alike.
        num_threads: for the kernels; None for OMP_NUM_THREADS, or all cores that the process may
            keep busy (`elastic_moe_kernels.native`), whichever is less.
        on_step: called with a `StepRecord` before every step, on the engine's thread: it must not
            call the engine.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_queue: int = 1024
    kv_cache_bytes: int | None = None
    enable_prefix_caching: bool = True
    num_threads: int | None = None
    on_step: Callable[[StepRecord], None] | None = None

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_queue"):
            self._check_count(name, getattr(self, name))
        for name in ("kv_cache_bytes", "num_threads"):
            if getattr(self, name) is not None:
                self._check_count(name, getattr(self, name))
        if self.on_step is not None and not callable(self.on_step):
            raise EngineError(f"on_step must be callable, got {shorten(self.on_step)}.")
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise EngineError(
                f"max_num_seqs must be at most max_num_batched_tokens, as each sequence takes a "
                f"token of a step, got {self.max_num_seqs} and {self.max_num_batched_tokens}."
            )

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """Options by name.

        Raises:
            EngineError: a name is unknown, or a value outside its range.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise EngineError(
                    f"there is no option {shorten(name)}. There are: {', '.join(known)}."
                )
        return cls(**options)

    @property
    def max_requests_per_call(self) -> int:
        """Requests of one list that are in the queue at once: enough to keep every step full."""
        return min(2 * self.max_num_seqs, self.max_queue)

    @property
    def threads(self) -> int:
        """Threads that the kernels take."""
        return self.num_threads or min(default_threads(), allowed_cores())

    def num_blocks(self, runner: ModelRunner) -> int:
        """Blocks of keys and values that a runner's cache has."""
        shape = runner.config.shape
        most = FULL_CONTEXTS * shape.num_layers * pages_for(runner.config.max_positions)
        if self.kv_cache_bytes is not None:
            return self.kv_cache_bytes // runner.block_bytes
        return max(
            min(most, _free_bytes(runner.device) // 4 // runner.block_bytes), shape.num_layers
        )

    @staticmethod
    def _check_count(name: str, value: object) -> None:
        number = as_index(value)
        if number is None or number < 1:
            raise EngineError(f"{name} must be an integer of at least 1, got {shorten(value)}.")


def _free_bytes(device: str) -> int:
    """Memory that could be had now."""
    if device != "cpu":
        import torch  # deferred: the CPU does without it

        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    with contextlib.suppress(AttributeError, ValueError, OSError):  # no such thing on every system
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return FREE_BYTES
