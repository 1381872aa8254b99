"""`Engine`: a loaded checkpoint that scores and generates, each call under its own sub-network.

Calls may come from any thread or event loop, and share batches: one thread of the engine's own runs
the model (see `core`), for everybody in the same steps.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import math
import os
import threading
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

import torch
from torch import Tensor

from elastic_moe.config import Routing, resolve_routing
from elastic_moe.engine.config import EngineOptions
from elastic_moe.engine.core import CLOSED, EngineCore
from elastic_moe.engine.job import Job, Sink
from elastic_moe.engine.outputs import Completion, Delta, Embedding
from elastic_moe.engine.prompts import Request, is_batch, pair, token_ids
from elastic_moe.engine.request_maker import RequestMaker
from elastic_moe.engine.running.loading import Backend, check_device, choose_backend, load_runner
from elastic_moe.engine.running.runner import Runner
from elastic_moe.engine.running.scoring import embed, score
from elastic_moe.engine.sampling_params import SamplingParams
from elastic_moe.engine.scheduling.block_manager import PAGE_TOKENS
from elastic_moe.engine.sequence import pages_for
from elastic_moe.engine.stats import EngineStats
from elastic_moe.engine.streams import AsyncPieces, DeltaStream, LoopMails, Pieces, WholeText
from elastic_moe.errors import ContextLengthError, EngineError, RequestError
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
        backend: what runs: 'reference' (PyTorch alone) or 'cpu' (the C++ kernels).
        runner: runs it; for who measures, while nothing else runs.
        dtype: what matrix inputs, keys and values are rounded to: 'bfloat16' or 'float32'.
        options: how many sequences run at once, and the like.
        calibration_sha256: SHA-256 of the text that channels were ranked on, None if they were not.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        folder: Path,
        options: EngineOptions | None = None,
    ) -> None:
        self.runner, self.tokenizer, self.folder = runner, tokenizer, folder
        self.options = options or EngineOptions()
        self.config, self.shape = runner.config, runner.config.shape
        self.name = checkpoint_name(folder)
        self.backend = runner.backend
        self.dtype = "bfloat16" if runner.dtype == torch.bfloat16 else "float32"
        self.calibration_sha256: str | None = None
        self._requests = RequestMaker(runner, tokenizer)
        self._numbers = itertools.count()
        self._mails = LoopMails()
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
        device: torch.device | str = "cpu",
        download: bool = False,
        **options: Any,
    ) -> Self:
        """Load a bundled model by name ('elastic-mini'), or a Hugging Face folder or id.

        Args:
            download: fetch an id that is not in the Hugging Face cache; otherwise nothing is.
            options: fields of `EngineOptions`, such as max_num_seqs or kv_cache_bytes.

        Raises:
            CheckpointError: the checkpoint is missing, broken or not supported.
            EngineError: the backend or device that was named cannot run here, or an option is
                unknown or outside its range.
        """
        # What cannot run is told before anything is looked for.
        choose_backend(backend, check_device(device))
        chosen = EngineOptions.of(options)
        folder = find_checkpoint(model, download=download)
        runner = load_runner(folder, backend=backend, dtype=dtype, device=device)
        return cls(runner, Tokenizer(folder), folder, chosen)

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
    ) -> dict[int, Tensor]:
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

        def rank() -> dict[int, Tensor]:
            core.forget_prefixes()
            return self.runner.rank_channels(windows, progress)

        order = core.call(rank)
        self.calibration_sha256 = hashlib.sha256(text.encode()).hexdigest()
        return order

    # Running

    def score(self, ids: Sequence[int], routing: Routing = None) -> Tensor:
        """Logits (T, V) float32 of a sequence, teacher-forced: row i predicts token i + 1."""
        subnet = self.resolve(routing)
        tokens = self._tokens(ids, new_tokens=0)
        return score(self._running_core(), self.runner, subnet, tokens)

    def embed(self, prompt: Prompt, routing: Routing = None) -> Embedding:
        """A text, or token ids, as a vector: the normalised mean of its final states.

        No model here was trained for it: texts that share words are near, meanings need not be.
        """
        subnet = self.resolve(routing)
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        tokens = self._tokens(ids, new_tokens=0)
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
    def generate(self, prompt: Any, routing: Any = None, sampling: Any = _DEFAULT) -> Any:
        """Complete a prompt (text or token ids), or a list of prompts.

        With a list of prompts, routing and sampling may be lists of the same length, and a list of
        completions comes back; they run together, as many at once as the options say.

        Raises:
            RoutingError: the model has no such sub-network.
            RequestError: the prompt is empty or has unknown ids, the lists differ in length, or
                the cache is too small for a request.
            ContextLengthError: prompt and max_tokens exceed the model's positions.
            QueueFullError: too many requests are unfinished.
        """
        one = not is_batch(prompt)
        requests = [(prompt, routing, sampling)] if one else pair(prompt, routing, sampling)
        sinks = [WholeText() for _ in requests]
        done = self._generate(self._make_all(requests, sinks), sinks)
        return done[0] if one else done

    def stream(
        self, prompt: Prompt, routing: Routing = None, sampling: SamplingParams = _DEFAULT
    ) -> Iterator[Delta]:
        """Complete one prompt piece by piece; dropping the iterator ends the request.

        Raises, at the call: as `generate`.
        """
        pieces = Pieces()
        job = self._make(prompt, routing, sampling, pieces)
        return DeltaStream(pieces, self._submit(job), self)

    async def agenerate(self, prompt: Any, routing: Any = None, sampling: Any = _DEFAULT) -> Any:
        """As `generate`, without blocking the event loop."""
        one = not is_batch(prompt)
        requests = [(prompt, routing, sampling)] if one else pair(prompt, routing, sampling)
        mail = self._mails.of_running_loop()
        sinks = [AsyncPieces(mail, whole=True) for _ in requests]
        # In a thread: long texts and schemas take their time.
        jobs = await asyncio.to_thread(self._make_all, requests, sinks)
        gate = asyncio.Semaphore(self._at_once)

        async def serve(job: Job, sink: AsyncPieces) -> Completion:
            async with gate:
                cancel = self._submit(job)
                try:
                    return await sink.completion()
                finally:
                    cancel()

        tasks = [asyncio.create_task(serve(*both)) for both in zip(jobs, sinks, strict=True)]
        try:
            done = await asyncio.gather(*tasks)
        finally:  # if one fails, the others end
            for task in tasks:
                task.cancel()
        return done[0] if one else done

    async def astream(
        self, prompt: Prompt, routing: Routing = None, sampling: SamplingParams = _DEFAULT
    ) -> AsyncGenerator[Delta]:
        """As `stream`, without blocking the event loop."""
        pieces = AsyncPieces(self._mails.of_running_loop())
        job = await asyncio.to_thread(self._make, prompt, routing, sampling, pieces)
        cancel = self._submit(job)
        try:
            while True:
                delta = await pieces.next()
                yield delta
                if delta.completion is not None:
                    return
        finally:
            cancel()

    def stats(self) -> EngineStats:
        """How busy the engine is."""
        return self._running_core().stats()

    def check_integrity(self) -> None:
        """Raise `EngineError` unless the engine's books of sequences and blocks are in order."""
        core = self._running_core()
        core.call(core.check_integrity)

    # Lifetime

    def close(self, drain_seconds: float = 0.0) -> None:
        """End the engine; whatever would run the model then raises `EngineError`.

        Text and sub-networks (`encode`, `decode`, `resolve`) need no model and stay usable.

        Args:
            drain_seconds: how long requests that run may take to end; those that have not ended
                by then raise `EngineError`.
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
                    core = self.options.start(self.runner, self._num_blocks)
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

    def _make(self, prompt: Any, routing: Any, sampling: Any, sink: Sink) -> Job:
        """A job for a request that can be served."""
        self._check_usable()
        subnet = self.resolve(routing)
        if not isinstance(sampling, SamplingParams):
            raise RequestError(f"sampling must be a SamplingParams, got {type(sampling).__name__}.")
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        tokens = self._tokens(ids, new_tokens=sampling.max_tokens)
        self._check_room(len(tokens) + sampling.max_tokens, subnet.depth)
        return self._requests.make(next(self._numbers), tokens, subnet, sampling, sink)

    def _submit(self, job: Job) -> Callable[[], None]:
        """Have a job done; returns what ends it."""
        core = self._running_core()
        core.submit(job)
        return partial(core.cancel, job)

    def _make_all(self, requests: Iterable[Request], sinks: Iterable[Sink]) -> list[Job]:
        """Jobs for requests, all of which are checked before the first one runs."""
        return [self._make(*request, sink) for request, sink in zip(requests, sinks, strict=True)]

    def _generate(self, jobs: Sequence[Job], sinks: Sequence[WholeText]) -> list[Completion]:
        """Do jobs, as many at once as the queue takes; if one fails, the others end."""
        waiting: deque[tuple[WholeText, Callable[[], None]]] = deque()
        done: list[Completion] = []
        try:
            for job, sink in zip(jobs, sinks, strict=True):
                if len(waiting) == self._at_once:
                    done.append(waiting[0][0].wait())
                    waiting.popleft()
                waiting.append((sink, self._submit(job)))
            while waiting:
                done.append(waiting[0][0].wait())
                waiting.popleft()
        finally:
            for _, cancel in waiting:
                cancel()
        return done

    @property
    def _at_once(self) -> int:
        """Requests of one call that are unfinished at once."""
        return min(2 * self.options.max_num_seqs, self.options.max_queue)

    @cached_property
    def _num_blocks(self) -> int:
        return self.options.num_blocks(self.runner)

    def _check_room(self, tokens: int, depth: int) -> None:
        """Raise `RequestError` if a sequence of so many tokens can never have its blocks."""
        needed, there = pages_for(tokens) * depth, self._num_blocks
        if needed > there:
            raise RequestError(
                f"{tokens} tokens in {depth} layers take {needed} blocks of keys and values, and "
                f"the cache has {there} ({PAGE_TOKENS} tokens of one layer each). Ask for fewer "
                f"tokens or layers, or make the engine with kv_cache_bytes of at least "
                f"{needed * self.runner.block_bytes}."
            )

    def _tokens(self, prompt: object, new_tokens: int) -> list[int]:
        limit, vocab_size = self.config.max_positions, self.config.vocab_size
        ids = token_ids(prompt, vocab_size)
        if len(ids) + new_tokens > limit:
            raise ContextLengthError(len(ids), new_tokens, limit)
        return ids
