"""`Engine`: a loaded checkpoint that scores and generates, each call under its own sub-network.

Calls may come from any thread or event loop, and share batches: one thread of the engine runs the
model (see `core`) for all of them.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from elastic_moe.config import Routing, resolve_routing
from elastic_moe.engine.config import EngineConfig
from elastic_moe.engine.core import CLOSED, EngineCore
from elastic_moe.engine.input_processor import InputProcessor, is_batch
from elastic_moe.engine.outputs import Completion, Delta, Embedding
from elastic_moe.engine.request import OutputQueue, Request
from elastic_moe.engine.running.loading import Backend, check_device, choose_backend, load_runner
from elastic_moe.engine.running.runner import ModelRunner
from elastic_moe.engine.sampling_params import SamplingParams
from elastic_moe.engine.scoring import embed, score
from elastic_moe.engine.stats import EngineStats
from elastic_moe.engine.streams import AsyncOutputs, BlockingOutputs, DeltaStream, LoopNotifiers
from elastic_moe.errors import EngineError, RequestError
from elastic_moe.model.checkpoints.checkpoint import DTypeName
from elastic_moe.model.checkpoints.folder import checkpoint_name, find_checkpoint
from elastic_moe.model.checkpoints.weights import TensorFiles
from elastic_moe.model.text.tokenizer import Tokenizer
from elastic_moe.routing import Subnet

Prompt = str | Sequence[int]
RANKING_WINDOW = 512  # tokens that are read at once to rank channels
_DEFAULT = SamplingParams()


class Engine:
    """One checkpoint, any sub-network per call. Make it with `Engine.from_pretrained`.

    Attributes:
        backend: 'reference' (PyTorch alone) or 'cpu' (the C++ kernels).
        runner: the model, for measurements while nothing else runs.
        config: of the model; `shape` is the part that sub-networks are resolved against.
        engine_config: how much the engine does at once.
        dtype: what matrix inputs, keys and values are rounded to: 'bfloat16' or 'float32'.
        calibration_sha256: SHA-256 of the text that channels were ranked on, None if they were not.
    """

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: Tokenizer,
        folder: Path,
        engine_config: EngineConfig | None = None,
    ) -> None:
        self.runner, self.tokenizer, self.folder = runner, tokenizer, folder
        self.engine_config = engine_config or EngineConfig()
        self.config, self.shape = runner.config, runner.config.shape
        self.name = checkpoint_name(folder)
        self.backend = runner.backend
        self.dtype = runner.dtype
        self.calibration_sha256: str | None = None
        runner.set_threads(self.engine_config.threads)
        self._num_blocks = self.engine_config.num_blocks(runner)
        self._inputs = InputProcessor(runner, tokenizer, self._num_blocks)
        self._notifiers = LoopNotifiers()
        self._core: EngineCore | None = None
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._closed = False

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        backend: Backend = "auto",
        dtype: DTypeName = "auto",
        device: object = "cpu",
        download: bool = False,
        **options: Any,
    ) -> Self:
        """Load a bundled model by name ('elastic-mini'), or a Hugging Face folder or id.

        Args:
            device: "cpu", or for the reference "cuda", "cuda:N" or a `torch.device`.
            download: fetch an id that is not in the Hugging Face cache; otherwise nothing is.
            options: fields of `EngineConfig`, such as max_num_seqs or kv_cache_bytes.

        Raises:
            CheckpointError: the checkpoint is missing, broken or not supported.
            EngineError: the backend or device that was named cannot run here, or an option is
                unknown or outside its range.
        """
        # What cannot run is refused before anything is searched.
        choose_backend(backend, check_device(device))
        engine_config = EngineConfig.of(options)
        folder = find_checkpoint(model, download=download)
        runner = load_runner(folder, backend=backend, dtype=dtype, device=device)
        return cls(runner, Tokenizer(folder), folder, engine_config)

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 of the weights, 64 hex digits."""
        return TensorFiles(self.folder).sha256()

    # Text and sub-networks

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, beginning with BOS where the model has one."""
        return self.tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return self.tokenizer.decode(ids)

    def resolve(self, routing: Routing) -> Subnet:
        """The sub-network that a configuration, a name or None means for this model."""
        return resolve_routing(self.shape, routing)

    def rank_channels(
        self,
        text: str,
        *,
        tokens: int = 8192,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[int, NDArray[np.int64]]:
        """Order every expert's channels by what they contribute on a calibration text, in place.

        The full network stays the same; width slices of a checkpoint that was not trained for them
        lose less. Call it before anything else runs.

        Args:
            text: like what the model is used on.
            tokens: how many of its tokens are read, at most.
            progress: called with (windows done, all).

        Returns:
            The order: layer -> (E, F), as `model.extract.extract` takes it.

        Raises:
            RequestError: the text gives no tokens.
        """
        ids = self.tokenizer.encode(text, add_special_tokens=False)[:tokens]
        size = min(RANKING_WINDOW, self.config.max_positions)
        windows = [ids[start : start + size] for start in range(0, len(ids), size)]
        if not windows:
            raise RequestError("the calibration text has no tokens; some thousand are needed.")
        core = self._running_core()

        def rank() -> dict[int, NDArray[np.int64]]:
            core.forget_prefixes()
            return self.runner.rank_channels(windows, progress)

        order = core.call(rank)
        self.calibration_sha256 = hashlib.sha256(text.encode()).hexdigest()
        return order

    # Running

    def score(self, ids: Sequence[int], routing: Routing = None) -> NDArray[np.float32]:
        """Logits (T, V) float32 of a sequence, teacher-forced: row i predicts token i + 1."""
        subnet = self.resolve(routing)
        tokens = self._inputs.token_ids(ids)
        return score(self._running_core(), self.runner, subnet, tokens)

    def embed(self, prompt: Prompt, routing: Routing = None) -> Embedding:
        """A text, or token ids, as a vector: the normalised mean of its final states.

        No model here was trained for it: texts that share words are near, meanings need not be.
        """
        subnet = self.resolve(routing)
        tokens = self._inputs.token_ids(prompt)
        return embed(self._running_core(), self.runner, subnet, tokens)

    @overload
    def generate(  # type: ignore[overload-overlap]  # an empty list is a batch
        self, prompt: Prompt, routing: Routing = ..., sampling: SamplingParams = ...
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompt: Sequence[Prompt],
        routing: Routing | Sequence[Routing] = ...,
        sampling: SamplingParams | Sequence[SamplingParams] = ...,
    ) -> list[Completion]: ...
    def generate(
        self, prompt: Any, routing: Any = None, sampling: Any = _DEFAULT
    ) -> Completion | list[Completion]:
        """Complete a prompt (text or token ids), or a list of prompts.

        With a list of prompts, routing and sampling may be lists of the same length, and a list of
        completions comes back. A list may be longer than the queue: its next prompt enters when a
        place is free.

        Raises:
            RoutingError: the model has no such sub-network.
            RequestError: the prompt is empty or has unknown ids, the lists differ in length, or
                the cache is too small for a request.
            ContextLengthError: prompt and max_tokens exceed the model's positions.
            QueueFullError: too many requests are unfinished.
        """
        outputs = BlockingOutputs(final_only=True)
        batch = is_batch(prompt)
        requests = self._requests(prompt, routing, sampling, outputs, batch)
        cancel = self._submit(requests)
        try:
            for _ in requests:
                outputs.wait()
        finally:  # if one fails, the others end
            cancel()
        return _completions(requests, batch)

    @overload
    def stream(
        self, prompt: Prompt, routing: Routing = ..., sampling: SamplingParams = ...
    ) -> DeltaStream: ...
    @overload
    def stream(
        self,
        prompt: Sequence[Prompt],
        routing: Routing | Sequence[Routing] = ...,
        sampling: SamplingParams | Sequence[SamplingParams] = ...,
    ) -> DeltaStream: ...
    def stream(self, prompt: Any, routing: Any = None, sampling: Any = _DEFAULT) -> DeltaStream:
        """As `generate`, piece by piece; dropping or closing the iterator cancels the call.

        Pieces of a list's prompts come as they are made; `Delta.prompt` says whose they are.

        Raises, at the call: as `generate`.
        """
        outputs = BlockingOutputs()
        batch = is_batch(prompt) and bool(prompt)  # an empty list is a prompt without tokens here
        requests = self._requests(prompt, routing, sampling, outputs, batch)
        return DeltaStream(outputs, len(requests), self._submit(requests), self)

    @overload
    async def agenerate(  # type: ignore[overload-overlap]
        self, prompt: Prompt, routing: Routing = ..., sampling: SamplingParams = ...
    ) -> Completion: ...
    @overload
    async def agenerate(
        self,
        prompt: Sequence[Prompt],
        routing: Routing | Sequence[Routing] = ...,
        sampling: SamplingParams | Sequence[SamplingParams] = ...,
    ) -> list[Completion]: ...
    async def agenerate(
        self, prompt: Any, routing: Any = None, sampling: Any = _DEFAULT
    ) -> Completion | list[Completion]:
        """As `generate`, without blocking the event loop."""
        outputs = AsyncOutputs(self._notifiers.of_running_loop(), final_only=True)
        batch = is_batch(prompt)
        inputs = (prompt, routing, sampling, outputs, batch)
        # In a thread: long texts and schemas take their time.
        requests = await asyncio.to_thread(self._requests, *inputs)
        cancel = self._submit(requests)
        try:
            for _ in requests:
                await outputs.get()
        finally:  # if one fails, the others end
            cancel()
        return _completions(requests, batch)

    @overload
    def astream(
        self, prompt: Prompt, routing: Routing = ..., sampling: SamplingParams = ...
    ) -> AsyncGenerator[Delta]: ...
    @overload
    def astream(
        self,
        prompt: Sequence[Prompt],
        routing: Routing | Sequence[Routing] = ...,
        sampling: SamplingParams | Sequence[SamplingParams] = ...,
    ) -> AsyncGenerator[Delta]: ...
    async def astream(
        self, prompt: Any, routing: Any = None, sampling: Any = _DEFAULT
    ) -> AsyncGenerator[Delta]:
        """As `stream`, without blocking the event loop; it starts when it is first read."""
        outputs = AsyncOutputs(self._notifiers.of_running_loop())
        batch = is_batch(prompt) and bool(prompt)
        inputs = (prompt, routing, sampling, outputs, batch)
        requests = await asyncio.to_thread(self._requests, *inputs)
        unfinished, cancel = len(requests), self._submit(requests)
        try:
            while unfinished:
                output = await outputs.get()
                unfinished -= output.request_finished
                yield output.delta()
        finally:
            cancel()

    def stats(self) -> EngineStats:
        """The load of the engine, as things are now."""
        return self._running_core().stats()

    def check_integrity(self) -> None:
        """Raise `EngineError` unless queues, blocks and requests of the engine fit together."""
        core = self._running_core()
        core.call(core.check_integrity)

    # Lifetime

    def close(self, drain_seconds: float = 0.0) -> None:
        """End the engine; whatever would run the model then raises `EngineError`.

        Text and sub-networks (`encode`, `decode`, `resolve`) need no model and stay usable.

        Args:
            drain_seconds: how long unfinished requests may take; those that have not ended by then
                raise `EngineError`.
        """
        if not (isinstance(drain_seconds, (int, float)) and 0 <= drain_seconds < math.inf):
            raise EngineError(
                f"drain_seconds must be a finite number of at least 0, got {drain_seconds!r}."
            )
        with self._lock:
            self._closed = True
            core = self._core
        if core is not None:
            core.close(drain_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _running_core(self) -> EngineCore:
        """The engine's thread, started when it is first needed."""
        self._check_usable()
        if self._core is None:
            with self._lock:
                self._check_usable()
                if self._core is None:
                    core = EngineCore(self.runner, self.engine_config, self._num_blocks)
                    # Also when Python ends: a thread inside native code would not survive that.
                    weakref.finalize(self, core.close)
                    self._core = core
        return self._core

    def _check_usable(self) -> None:
        if self._closed:
            raise EngineError(CLOSED)
        if os.getpid() != self._pid:
            raise EngineError(
                "the engine was made in another process and cannot be used after a fork. "
                "Make it in the process that uses it, or start processes with 'spawn'."
            )

    def _requests(
        self, prompt: Any, routing: Any, sampling: Any, outputs: OutputQueue, batch: bool
    ) -> list[Request]:
        """The requests of a call, all of which are checked before the first one runs."""
        self._check_usable()
        return self._inputs.requests(prompt, routing, sampling, outputs, batch=batch)

    def _submit(self, requests: Sequence[Request]) -> Callable[[], None]:
        """Run requests; returns a function that cancels them."""
        core = self._running_core()
        return partial(core.cancel, core.submit(requests))


def _completions(requests: Sequence[Request], batch: bool) -> Completion | list[Completion]:
    completions = [request.completion() for request in requests]
    return completions if batch else completions[0]
