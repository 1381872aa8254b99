"""The engine's one thread: it owns model, scheduler and requests, and runs step after step.

Callers leave messages in an inbox, and get outputs through the queue of their call. Nothing else is
shared but counters. A request that fails takes no other along. The thread ends when the engine is
closed, or by a fault of its own, which every unfinished request then raises.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from elastic_moe.engine.config import EngineConfig
from elastic_moe.engine.generation.sampler import Logits, choose_tokens
from elastic_moe.engine.request import OutputQueue, Request, Sequence, SequenceOutput
from elastic_moe.engine.running.runner import Chunk, LogitsMode, ModelRunner, StepOutput
from elastic_moe.engine.scheduling.admission import Admission, Call
from elastic_moe.engine.scheduling.block_manager import BlockManager
from elastic_moe.engine.scheduling.scheduler import Scheduler, SchedulerOutput
from elastic_moe.engine.stats import EngineStats, StepRecord
from elastic_moe.errors import EngineError

T = TypeVar("T")
CLOSED = "the engine is closed. Make a new one with Engine.from_pretrained."


class EngineCore:
    """Runs requests on a thread of its own.

    Args:
        num_blocks: blocks of keys and values to reserve.

    Raises:
        EngineError: there is not enough memory for the blocks.
    """

    def __init__(self, runner: ModelRunner, config: EngineConfig, num_blocks: int) -> None:
        try:
            runner.reserve(num_blocks)
        except (RuntimeError, MemoryError, ValueError) as error:
            raise EngineError(
                f"{num_blocks * runner.block_bytes} bytes for keys and values cannot be had. "
                f"Choose a smaller kv_cache_bytes."
            ) from error
        self._runner, self._on_step = runner, config.on_step
        self._blocks = BlockManager(num_blocks, prefix_caching=config.enable_prefix_caching)
        self._scheduler = Scheduler(
            self._blocks,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
        )
        self._requests: set[Request] = set()  # in the queue
        self._numbers = itertools.count()
        # Outputs that leave when the next native call is about to begin: a reader that wakes
        # earlier would only wait for the interpreter's lock.
        self._outputs: list[tuple[OutputQueue, SequenceOutput]] = []
        self._inbox: deque[Callable[[], None]] = deque()
        self._calls: deque[Callable[[], None]] = deque()  # long ones: a step comes between two
        self._wake = threading.Condition()
        self._admission = Admission(config.max_queue, config.max_requests_per_call)  # under _wake
        self._closed = False  # no more calls; under _wake
        self._drain_until: float | None = None
        self._preemptions = self._steps = 0
        self._prompt_tokens = self._written_tokens = self._searched_tokens = self._found_tokens = 0
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._work, name="elastic-moe engine", daemon=True)
        self._thread.start()

    # From any thread

    def submit(self, requests: Iterable[Request]) -> Call:
        """Accept the requests of one call; see `Admission`.

        Raises:
            QueueFullError: the queue is full.
            EngineError: the engine is closed.
        """
        call = Call(requests)
        with self._wake:
            self._check_open()
            for request in self._admission.accept(call):
                self._inbox.append(partial(self._begin, request))
            self._wake.notify()
        return call

    def cancel(self, call: Call) -> None:
        """End a call before the next step, if it has not ended; it gets no more outputs."""
        if os.getpid() == self._pid and not all(r.finished for r in call.requests):
            self._post(lambda: self._cancel(call))

    def call(self, work: Callable[[], T]) -> T:
        """Run something between two steps, on the thread that owns the model."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001  (the caller's, who gets it)
                future.set_exception(error)

        with self._wake:
            self._check_open()
            self._calls.append(run)
            self._wake.notify()
        return future.result()

    def stats(self) -> EngineStats:
        """The load, as things are now."""
        return EngineStats(
            unfinished=self._admission.unfinished,
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            used_blocks=self._blocks.used_blocks,
            num_blocks=self._blocks.num_blocks,
            preemptions=self._preemptions,
            evicted_pages=self._blocks.evicted_pages,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            written_tokens=self._written_tokens,
            searched_tokens=self._searched_tokens,
            found_tokens=self._found_tokens,
        )

    def close(self, drain_seconds: float = 0.0) -> None:
        """Accept no more calls, let requests end within so many seconds, stop the thread.

        Requests that have not ended by then raise `EngineError`. In a forked process there is no
        thread to stop, and nothing happens.
        """
        if os.getpid() != self._pid:
            return
        until = time.monotonic() + drain_seconds
        with self._wake:
            self._closed = True
        self._post(lambda: self._drain(until))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def forget_prefixes(self) -> None:
        """Empty the prefix cache, which holds for this model alone; for `call`."""
        if self._scheduler.busy:
            raise EngineError("requests are running. Wait for them to end.")
        self._blocks.drop_idle()

    def check_integrity(self) -> None:
        """Raise `EngineError` unless queues, blocks and requests fit together; for `call`."""
        self._scheduler.check_integrity()
        scheduled = set(self._scheduler.running) | set(self._scheduler.waiting)
        unfinished = {
            s for request in self._requests for s in request.sequences if s.finish_reason is None
        }
        if scheduled != unfinished:
            raise EngineError("the engine is broken: it lost a sequence or a request.")

    def _drain(self, until: float) -> None:
        self._drain_until = min(until, self._drain_until or until)

    def _check_open(self) -> None:
        if threading.current_thread() is self._thread:
            raise EngineError("on_step runs on the engine's thread, which cannot wait for itself.")
        if self._closed:
            raise EngineError(CLOSED)

    def _post(self, message: Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(message)
            self._wake.notify()

    # On the engine's thread

    def _work(self) -> None:
        self._runner.set_threads(self._runner.threads)
        error: Exception = EngineError("the engine was closed before the request had ended.")
        try:
            while True:
                if not self._scheduler.busy:
                    self._deliver()
                if not self._scheduler.busy and self._drain_until is None:
                    with self._wake:
                        while not self._inbox and not self._calls:
                            self._wake.wait()
                while self._inbox:
                    self._inbox.popleft()()
                if self._calls:
                    self._deliver()  # a call may take long
                    self._calls.popleft()()
                if self._drain_until is not None and (
                    not self._scheduler.busy or time.monotonic() >= self._drain_until
                ):
                    return
                if self._scheduler.busy:
                    self._step()
        except Exception as fault:  # noqa: BLE001  (a defect of ours: nobody may wait for ever)
            error = EngineError(f"the engine failed: {type(fault).__name__}: {fault}")
            error.__cause__ = fault
        finally:
            self._deliver()
            with self._wake:
                self._closed = True
                for request in self._admission.withdraw_all():
                    request.outputs.fail(error)
            for request in list(self._requests):
                self._fail(request, error)
            for late in (self._inbox, self._calls):  # what came in meanwhile
                while late:
                    late.popleft()()
            for request in list(self._requests):
                self._fail(request, error)

    def _begin(self, request: Request) -> None:
        request.number = next(self._numbers)
        self._requests.add(request)
        try:
            for sequence in request.sequences:
                self._runner.add(sequence)
        except Exception as error:  # noqa: BLE001  (of this request alone: its sub-network)
            # Not at once: it would let the next request begin, within the beginning of this one.
            self._inbox.append(partial(self._fail, request, error))
            return
        for sequence in request.sequences:
            self._scheduler.add(sequence)

    def _finish(self, request: Request) -> None:
        """Drop a request, complete or not; others may enter the queue in its stead."""
        if request not in self._requests:
            return
        request.finished = True
        self._requests.remove(request)
        for sequence in request.sequences:
            self._scheduler.remove(sequence)
            self._runner.remove(sequence)
        with self._wake:
            admitted = self._admission.leave(request)
        for other in admitted:
            self._begin(other)

    def _cancel(self, call: Call) -> None:
        with self._wake:
            self._admission.withdraw(call)
        for request in call.requests:
            self._finish(request)

    def _fail(self, request: Request, error: BaseException) -> None:
        self._finish(request)
        self._deliver()
        request.outputs.fail(error)

    def _deliver(self) -> None:
        for queue, output in self._outputs:
            queue.put(output)
        for queue, _ in self._outputs:  # now: a reader that wakes takes the interpreter
            queue.flush()
        self._outputs.clear()

    def _step(self) -> None:
        output = self._scheduler.schedule()
        self._preemptions += len(output.preempted)
        if not output.scheduled:
            self._deliver()
            return
        chunks = [self._chunk(sequence, count) for sequence, count in output.scheduled]
        if self._on_step is not None:
            self._observe(self._on_step, output)
        self._steps += 1
        self._deliver()
        try:
            out = self._runner.run(chunks)
        except Exception as error:  # noqa: BLE001  (whose it is shows when they run singly)
            self._run_singly(output.scheduled, chunks, error)
            return
        self._update(output.scheduled, chunks, out)

    def _chunk(self, sequence: Sequence, count: int) -> Chunk:
        """The next tokens of a sequence, whose blocks are allocated."""
        start, request = sequence.num_computed_tokens, sequence.request
        if not request.scheduled_time:
            request.scheduled_time = time.perf_counter()
        mode: LogitsMode = "none"
        if start + count == len(sequence.token_ids):
            mode = sequence.sampler.logits_mode
        if not sequence.reads_cache and start + 1 < sequence.num_prompt_tokens:
            mode = "all"  # logits of the prompt, for its logprobs
        return Chunk(sequence, sequence.token_ids[start : start + count], mode)

    def _run_singly(
        self, scheduled: list[tuple[Sequence, int]], chunks: list[Chunk], error: Exception
    ) -> None:
        """A step failed: run its parts one by one, so that only the guilty ones fail."""
        for part, chunk in zip(scheduled, chunks, strict=True):
            request = part[0].request
            if request.finished:
                continue
            try:
                out = self._runner.run([chunk]) if len(chunks) > 1 else None
            except Exception as own:  # noqa: BLE001  (its request gets it)
                out, error = None, own
            if out is None:
                self._fail(request, error)
            else:
                self._update([part], [chunk], out)

    def _update(
        self, scheduled: list[tuple[Sequence, int]], chunks: list[Chunk], out: StepOutput
    ) -> None:
        """Record what ran, and choose the next token of every sequence that is up to date."""
        many = any(chunk.logits in ("last", "all") for chunk in chunks)
        logits: Logits | None = out.logits if many else None
        ready: list[tuple[Sequence, int, int]] = []  # with a row of logits, the best id
        end = 0
        parts = zip(scheduled, chunks, out.experts_run, strict=True)
        for (sequence, count), (_, _, mode), experts_run in parts:
            request = sequence.request
            rows = 0 if mode == "none" else count if mode == "all" else 1
            end += rows
            if request.finished:  # by a choice before this one
                continue
            start = sequence.num_computed_tokens
            self._scheduler.update(sequence, count)
            request.count(count, experts_run)
            if not rows:
                continue
            try:
                if -1 in out.best_ids[end - rows : end]:
                    raise EngineError(
                        f"the logits after {sequence.num_computed_tokens} tokens are not numbers: "
                        f"weights or keys of config.json are so large or small that a sum "
                        f"overflows. Fetch or convert the checkpoint again."
                    )
                if not sequence.reads_cache and start + 1 < sequence.num_prompt_tokens:
                    own = None if logits is None else logits[end - rows : end]
                    request.add_prompt_logits(start, own, self._runner.threads)
                if sequence.num_new_tokens:
                    continue
                if sequence.wants_token:
                    sequence.sampler.update_mask()
                    ready.append((sequence, end - 1, out.best_ids[end - 1]))
                else:
                    self._record(sequence.finish_prompt())
            except Exception as error:  # noqa: BLE001  (of this request alone: schema)
                self._fail(request, error)
        if not ready:
            return
        sequences, logits_rows, best_ids = zip(*ready, strict=True)
        samplers = [s.sampler for s in sequences]
        tokens = choose_tokens(samplers, logits, logits_rows, best_ids, self._runner.threads)
        for sequence, (token, logprob) in zip(sequences, tokens, strict=True):
            if sequence.request.finished:  # by a choice before this one
                continue
            try:
                self._record(sequence.append(token, logprob))
            except Exception as error:  # noqa: BLE001  (of this request alone: text, schema)
                self._fail(sequence.request, error)

    def _record(self, output: SequenceOutput) -> None:
        """Count an output, and deliver it with the next step."""
        sequence, request = output.sequence, output.sequence.request
        if output.token_id is not None:
            self._written_tokens += 1
        if not request.first_token_time:
            request.first_token_time = time.perf_counter()
            first, prompt_tokens = request.sequences[0], len(request.prompt_token_ids)
            self._prompt_tokens += prompt_tokens
            self._searched_tokens += prompt_tokens * first.reads_cache
            self._found_tokens += first.num_cached_tokens or 0
            output = output._replace(prompt_logprobs=request.prompt_logprobs)
        if output.finish_reason is not None:
            if not sequence.index:
                request.last_token_time = time.perf_counter()
            self._scheduler.remove(sequence)
            if request.all_sequences_finished:
                output = output._replace(request_finished=True)
                self._finish(request)
        if output.request_finished or not request.outputs.final_only:
            self._outputs.append((request.outputs, output))

    def _observe(self, on_step: Callable[[StepRecord], None], output: SchedulerOutput) -> None:
        record = StepRecord(
            tuple((*sequence.arrival, count) for sequence, count in output.scheduled),
            tuple(sequence.arrival for sequence in output.preempted),
        )
        try:
            on_step(record)
        except Exception as error:  # noqa: BLE001  (an observer's fault is not the requests')
            self._on_step = None
            warnings.warn(
                f"on_step raised {type(error).__name__}: {error}. It is not called any more.",
                RuntimeWarning,
                stacklevel=1,
            )
