"""`Engine`: a loaded checkpoint that scores and generates, each call under its own sub-network.

Calls may come from any thread or event loop. Sequences run one at a time: a call holds the model
for one step, so concurrent calls interleave token by token.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, overload

import torch
from elastic_moe_kernels import cpu, ops
from elastic_moe_kernels.errors import KernelError
from torch import Tensor

from elastic_moe.config import Routing, resolve_routing
from elastic_moe.engine.generation import Generation, chunks
from elastic_moe.engine.native_runner import NativeRunner
from elastic_moe.engine.prompts import is_batch, token_ids
from elastic_moe.engine.request import Completion, Delta, SamplingParams
from elastic_moe.engine.runner import Chunk, ReferenceRunner, Runner
from elastic_moe.errors import ContextLengthError, EngineError, RequestError
from elastic_moe.model.checkpoint import DTypeName, load_model
from elastic_moe.model.folder import checkpoint_name, find_checkpoint
from elastic_moe.model.tokenizer import Tokenizer
from elastic_moe.model.weights import TensorFiles
from elastic_moe.routing import Subnet

Backend = Literal["auto", "reference", "cpu"]
Prompt = str | Sequence[int]
RANKING_WINDOW = 512  # tokens that are read at once to rank channels
_DEFAULT = SamplingParams()


class Engine:
    """One checkpoint, any sub-network per call. Make it with `Engine.from_pretrained`.

    Attributes:
        backend: what runs: 'reference' (PyTorch alone) or 'cpu' (the C++ kernels).
        runner: runs it.
        dtype: what matrix inputs, keys and values are rounded to: 'bfloat16' or 'float32'.
        calibration_sha256: SHA-256 of the text that channels were ranked on, None if they were not.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        folder: Path,
    ) -> None:
        self.runner, self.tokenizer, self.folder = runner, tokenizer, folder
        self.config, self.shape = runner.config, runner.config.shape
        self.name = checkpoint_name(folder)
        self.backend = runner.backend
        self.dtype = "bfloat16" if runner.dtype == torch.bfloat16 else "float32"
        self.calibration_sha256: str | None = None
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
    ) -> Self:
        """Load a bundled model by name ('elastic-mini'), or a Hugging Face folder or id.

        Args:
            download: fetch an id that is not in the Hugging Face cache; otherwise nothing is.

        Raises:
            CheckpointError: the checkpoint is missing, broken or not supported.
            EngineError: the backend or device that was named cannot run here.
        """
        # What cannot run is told before anything is looked for.
        _choose_backend(backend, _check_device(device))
        folder = find_checkpoint(model, download=download)
        runner = load_runner(folder, backend=backend, dtype=dtype, device=device)
        return cls(runner, Tokenizer(folder), folder)

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
        with self._step():
            order = self.runner.rank_channels(windows, progress)
            self.calibration_sha256 = hashlib.sha256(text.encode()).hexdigest()
        return order

    # Running

    def score(self, ids: Sequence[int], routing: Routing = None) -> Tensor:
        """Logits (T, V) float32 of a sequence, teacher-forced: row i predicts token i + 1."""
        subnet = self.resolve(routing)
        tokens = self._tokens(ids, new_tokens=0)
        with self._step(), torch.inference_mode():
            sequence = self.runner.open(subnet, len(tokens))
            parts = [self.runner.run([Chunk(sequence, c, "all")]).logits for c in chunks(tokens)]
            return torch.cat(parts)

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
        completions comes back.

        Raises:
            RoutingError: the model has no such sub-network.
            RequestError: the prompt is empty or has unknown ids, or the lists differ in length.
            ContextLengthError: prompt and max_tokens exceed the model's positions.
        """
        if not is_batch(prompt):
            return self._finish(self.stream(prompt, routing, sampling))
        requests = zip(
            prompt,
            _per_prompt("routing", routing, len(prompt)),
            _per_prompt("sampling", sampling, len(prompt)),
            strict=True,
        )
        # All requests are checked before the first one runs.
        streams = [self.stream(*request) for request in requests]
        return [self._finish(stream) for stream in streams]

    def stream(
        self, prompt: Prompt, routing: Routing = None, sampling: SamplingParams = _DEFAULT
    ) -> Iterator[Delta]:
        """Complete one prompt piece by piece; dropping the iterator ends the request.

        Raises, at the call: as `generate`.
        """
        self._check_usable()
        subnet = self.resolve(routing)
        if not isinstance(sampling, SamplingParams):
            raise RequestError(f"sampling must be a SamplingParams, got {type(sampling).__name__}.")
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        tokens = self._tokens(ids, new_tokens=sampling.max_tokens)
        generation = Generation(self.runner, self.tokenizer, tokens, subnet, sampling)
        return self._deltas(generation)

    async def agenerate(self, prompt: Any, routing: Any = None, sampling: Any = _DEFAULT) -> Any:
        """As `generate`, without blocking the event loop."""
        return await asyncio.to_thread(self.generate, prompt, routing, sampling)

    async def astream(
        self, prompt: Prompt, routing: Routing = None, sampling: SamplingParams = _DEFAULT
    ) -> AsyncIterator[Delta]:
        """As `stream`, without blocking the event loop."""
        deltas = self.stream(prompt, routing, sampling)
        while (delta := await asyncio.to_thread(next, deltas, None)) is not None:
            yield delta

    # Lifetime

    def close(self) -> None:
        """End the engine; whatever would run the model then raises `EngineError`.

        Text and sub-networks (`encode`, `decode`, `resolve`) need no model and stay usable.
        """
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _step(self) -> threading.Lock:
        """The lock that one model step holds, after checking that the engine can run."""
        self._check_usable()
        return self._lock

    def _check_usable(self) -> None:
        if self._closed:
            raise EngineError("the engine is closed. Make a new one with Engine.from_pretrained.")
        if os.getpid() != self._pid:
            raise EngineError(
                "the engine was made in another process and cannot be used after a fork. "
                "Make it in the process that uses it, or start processes with 'spawn'."
            )

    def _tokens(self, prompt: object, new_tokens: int) -> list[int]:
        limit, vocab_size = self.config.max_positions, self.config.vocab_size
        ids = token_ids(prompt, vocab_size)
        if len(ids) + new_tokens > limit:
            raise ContextLengthError(len(ids), new_tokens, limit)
        return ids

    def _deltas(self, generation: Generation) -> Iterator[Delta]:
        while True:
            with self._step():
                delta = generation.step()
            yield delta
            if delta.finish_reason is not None:
                return

    @staticmethod
    def _finish(deltas: Iterator[Delta]) -> Completion:
        completion = None
        for delta in deltas:
            completion = delta.completion
        if completion is None:
            raise EngineError("the generation ended without a completion.")
        return completion


def load_runner(
    folder: Path,
    *,
    backend: Backend = "auto",
    dtype: DTypeName = "auto",
    device: torch.device | str = "cpu",
) -> Runner:
    """What runs a checkpoint folder, without the text around it.

    Raises:
        CheckpointError: the checkpoint is missing, broken or not supported.
        EngineError: the backend or device that was named cannot run here.
    """
    place = _check_device(device)
    runner: Runner | None = None
    if _choose_backend(backend, place) == "cpu":
        runner = _native_runner(folder, dtype, backend)
    if runner is None:
        runner = ReferenceRunner(load_model(folder, dtype=dtype, device=place))
    return runner


def _choose_backend(backend: Backend, device: torch.device) -> Literal["reference", "cpu"]:
    on_cpu = device.type == "cpu"
    if backend == "cpu" and not on_cpu:
        raise EngineError("backend 'cpu' needs the model on the CPU. Use device='cpu'.")
    if backend not in ("auto", "reference", "cpu"):
        raise EngineError(f"backend must be 'auto', 'reference' or 'cpu', got {backend!r}.")
    if backend == "reference" or not on_cpu:
        return "reference"
    if backend == "auto":
        ops.warn_if_degraded()
        if cpu.missing():
            return "reference"
    try:  # a level that was named and is not there is an error for "auto" too
        ops.require("cpu")
    except KernelError as error:
        raise EngineError(str(error)) from error
    return "cpu"


def _native_runner(folder: Path, dtype: DTypeName, backend: Backend) -> Runner | None:
    """The C++ step; None if this model's sizes are not for it and 'auto' may choose another."""
    try:
        return NativeRunner(folder, dtype)
    except KernelError as error:
        if backend == "cpu":
            raise EngineError(f"{folder}: {error} Use backend='reference'.") from error
        warnings.warn(
            f"{folder} runs on the PyTorch reference, which is slower: {error}",
            RuntimeWarning,
            stacklevel=3,
        )
        return None


def _check_device(device: torch.device | str) -> torch.device:
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        place = None
    if place is None or place.type not in ("cpu", "cuda"):
        raise EngineError(f"device must be 'cpu', 'cuda' or 'cuda:N', got {str(device)!r}.")
    count = torch.cuda.device_count()
    if place.type == "cuda" and (place.index or 0) >= count:
        raise EngineError(
            f"device {str(device)!r} is not there: torch {torch.__version__} sees {count} CUDA "
            f"devices. Use device='cpu', or a torch built for the driver of this machine."
        )
    return place


def _per_prompt(field: str, value: Any, count: int) -> list[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * count
    if len(value) != count:
        raise RequestError(f"{field} lists {len(value)} values for {count} prompts.")
    return list(value)
