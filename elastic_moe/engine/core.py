"""The engine's one thread: it owns the model and runs step after step for whoever asks.

Callers leave requests in a mailbox and get pieces of text through a sink. In between, nothing is
shared but counters. A request that fails takes no other with it; the thread ends only when it is
told to, or by a fault of its own, which every request is then told.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from elastic_moe.engine.generation.generation import Piece
from elastic_moe.engine.job import Job, Sink, Text
from elastic_moe.engine.running.runner import Chunk, Runner, StepOutput, Wanted
from elastic_moe.engine.scheduling.block_manager import BlockManager
from elastic_moe.engine.scheduling.scheduler import Plan, Scheduler
from elastic_moe.engine.sequence import Sequence
from elastic_moe.engine.stats import EngineStats, StepRecord
from elastic_moe.errors import EngineError, QueueFullError

T = TypeVar("T")
CLOSED = "the engine is closed. Make a new one with Engine.from_pretrained."


class EngineCore:
    """Runs jobs on a thread of its own.

    Args:
        num_blocks: blocks of keys and values, which the runner has reserved.
        max_queue: jobs that may be unfinished at once.
        num_threads: for the kernels.
        on_step: told every step, on the engine's thread.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        num_blocks: int,
        max_step_tokens: int,
        max_sequences: int,
        max_queue: int,
        prefix_caching: bool,
        num_threads: int,
        on_step: Callable[[StepRecord], None] | None = None,
    ) -> None:
        self._runner, self._on_step = runner, on_step
        self._max_queue, self._num_threads = max_queue, num_threads
        self._blocks = BlockManager(num_blocks, prefix_caching=prefix_caching)
        self._scheduler = Scheduler(
            self._blocks, max_step_tokens=max_step_tokens, max_sequences=max_sequences
        )
        self._texts: dict[Sequence, Text] = {}
        self._jobs: set[Job] = set()
        # Pieces that leave when the next native call is about to begin: a reader that wakes earlier
        # would only wait for the interpreter's lock.
        self._outbox: list[tuple[Sink, Piece]] = []
        self._mail: deque[Callable[[], None]] = deque()
        self._calls: deque[Callable[[], None]] = deque()  # long ones: a step comes between two
        self._wake = threading.Condition()
        self._unfinished = 0  # jobs that were taken in; guarded by _wake
        self._closed = False  # no more jobs; guarded by _wake
        self._drain_until: float | None = None
        self._preemptions = self._steps = 0
        self._read = self._written = self._searched = self._found = 0  # tokens
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._work, name="elastic-moe engine", daemon=True)
        self._thread.start()

    # From any thread

    def submit(self, job: Job) -> None:
        """Take a job in.

        Raises:
            QueueFullError: too many are unfinished.
            EngineError: the engine is closed.
        """
        with self._wake:
            self._check_open()
            if self._unfinished >= self._max_queue:
                raise QueueFullError(self._unfinished, self._max_queue)
            self._unfinished += 1
            self._mail.append(lambda: self._begin(job))
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """End a job before the next step, if it has not ended; nothing more comes to its sink."""
        if not job.ended and os.getpid() == self._pid:
            self._post(lambda: self._end(job))

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
        """How busy it is."""
        return EngineStats(
            unfinished=self._unfinished,
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            used_blocks=self._blocks.used_blocks,
            num_blocks=self._blocks.num_blocks,
            preemptions=self._preemptions,
            evicted_pages=self._blocks.evicted_pages,
            steps=self._steps,
            prompt_tokens=self._read,
            written_tokens=self._written,
            searched_tokens=self._searched,
            found_tokens=self._found,
        )

    def close(self, drain_seconds: float = 0.0) -> None:
        """Take nothing more in, let what runs end within so many seconds, stop the thread.

        What has not ended by then is told so by an `EngineError`. In a process that was forked off
        there is no thread to stop, and nothing happens.
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
        """Drop cached prefixes, as another model would have left others; for `call`."""
        if self._scheduler.busy:
            raise EngineError("requests are running. Wait for them to end.")
        self._blocks.drop_idle()

    def check_integrity(self) -> None:
        """Raise `EngineError` unless the books are in order; for `call`."""
        self._scheduler.check_integrity()
        known = set(self._scheduler.running) | set(self._scheduler.waiting)
        if known != set(self._texts) or {t.job for t in self._texts.values()} != self._jobs:
            raise EngineError("the engine is broken: it lost a text or a job.")

    def _drain(self, until: float) -> None:
        self._drain_until = min(until, self._drain_until or until)

    def _check_open(self) -> None:
        if threading.current_thread() is self._thread:
            raise EngineError("on_step runs on the engine's thread, which cannot wait for itself.")
        if self._closed:
            raise EngineError(CLOSED)

    def _post(self, message: Callable[[], None]) -> None:
        with self._wake:
            self._mail.append(message)
            self._wake.notify()

    # On the engine's thread

    def _work(self) -> None:
        torch.set_num_threads(self._num_threads)
        error: Exception = EngineError("the engine was closed before the request had ended.")
        try:
            while True:
                if not self._scheduler.busy:
                    self._deliver()
                if not self._scheduler.busy and self._drain_until is None:
                    with self._wake:
                        while not self._mail and not self._calls:
                            self._wake.wait()
                while self._mail:
                    self._mail.popleft()()
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
            for job in list(self._jobs):
                self._fail(job, error)
            for late in (self._mail, self._calls):  # what came in meanwhile
                while late:
                    late.popleft()()
            for job in list(self._jobs):
                self._fail(job, error)

    def _begin(self, job: Job) -> None:
        self._jobs.add(job)
        for text in job.texts:
            self._texts[text.sequence] = text
            self._scheduler.add(text.sequence)

    def _end(self, job: Job) -> None:
        """Forget a job, finished or not."""
        if job.ended or job not in self._jobs:
            return
        job.ended = True
        self._jobs.remove(job)
        for text in job.texts:
            self._forget(text)
        with self._wake:
            self._unfinished -= 1

    def _forget(self, text: Text) -> None:
        if self._texts.pop(text.sequence, None) is not None:
            self._scheduler.remove(text.sequence)

    def _fail(self, job: Job, error: BaseException) -> None:
        self._end(job)
        self._deliver()
        job.sink.fail(error)

    def _deliver(self) -> None:
        for sink, piece in self._outbox:
            sink.put(piece)
        for sink, _ in self._outbox:  # now: a reader that wakes takes the interpreter
            sink.flush()
        self._outbox.clear()

    def _step(self) -> None:
        plan = self._scheduler.plan()
        for sequence in plan.preempted:
            self._texts[sequence].fresh = True
            self._preemptions += 1
        if not plan.parts:
            self._deliver()
            return
        texts = [self._texts[sequence] for sequence, _ in plan.parts]
        chunks = [
            self._chunk(text, count) for text, (_, count) in zip(texts, plan.parts, strict=True)
        ]
        if self._on_step is not None:
            self._observe(self._on_step, plan)
        self._steps += 1
        self._deliver()
        try:
            out = self._runner.run(chunks)
        except Exception as error:  # noqa: BLE001  (whose it is shows when they run singly)
            self._run_singly(texts, chunks, error)
            return
        self._publish(texts, chunks, out)

    def _chunk(self, text: Text, count: int) -> Chunk:
        """The next tokens of a text, whose pages are there."""
        sequence, state = text.sequence, text.state
        start = sequence.computed
        if text.fresh:
            state.restart(start)
            text.fresh = False
            text.job.first_run = text.job.first_run or time.perf_counter()
        if state.pages != len(sequence.pages):
            state.enter(sequence.pages)
        wanted: Wanted = "none"
        if start + count == len(sequence.token_ids):
            wanted = text.generation.sampler.wanted
        if text.tells_prompt and start + 1 < sequence.prompt_tokens:
            wanted = "all"
        return Chunk(state, sequence.token_ids[start : start + count], wanted)

    def _run_singly(self, texts: list[Text], chunks: list[Chunk], error: Exception) -> None:
        """A step failed: run its parts one by one, so that only the guilty ones fail."""
        for text, chunk in zip(texts, chunks, strict=True):
            if text.job.ended:
                continue
            chunk.sequence.length = text.sequence.computed
            try:
                out = self._runner.run([chunk]) if len(chunks) > 1 else None
            except Exception as own:  # noqa: BLE001  (its request gets it)
                out, error = None, own
            if out is None:
                self._fail(text.job, error)
            else:
                self._publish([text], [chunk], out)

    def _publish(self, texts: list[Text], chunks: list[Chunk], out: StepOutput) -> None:
        """Give every text its tokens."""
        logits = None
        for chunk in chunks:
            if chunk.logits in ("last", "all"):
                logits = out.logits.numpy(force=True)
                break
        row = 0
        for text, chunk, experts in zip(texts, chunks, out.experts_run, strict=True):
            job, count = text.job, len(chunk.token_ids)
            rows = 0 if chunk.logits == "none" else count if chunk.logits == "all" else 1
            own = None if logits is None else logits[row : row + rows]
            best_ids = out.best_ids[row : row + rows]
            row += rows
            if job.ended:  # by a choice before this one
                continue
            start = text.sequence.computed
            self._scheduler.computed(text.sequence, count)
            job.count(count, experts)
            if not rows:
                continue
            try:
                self._give(text, start, own, best_ids)
            except Exception as error:  # noqa: BLE001  (of this request alone: text, schema)
                self._fail(job, error)

    def _give(self, text: Text, start: int, logits: Any, best_ids: list[int]) -> None:
        """Logits (n, V) of a text's last n computed tokens, the first of them at `start`."""
        job, sequence = text.job, text.sequence
        if -1 in best_ids:
            raise EngineError(
                f"the logits after {sequence.computed} tokens are not numbers: weights or keys of "
                f"config.json are so large or small that a sum overflows. Fetch or convert the "
                f"checkpoint again."
            )
        if text.tells_prompt and start + 1 < sequence.prompt_tokens:
            job.take_prompt_logits(start, logits)
        if sequence.remaining:
            return
        piece = text.generation.take(None if logits is None else logits[-1], best_ids[-1])
        if piece.token_id is not None:
            sequence.token_ids.append(piece.token_id)
            self._written += 1
        if not job.first_token:
            job.first_token = time.perf_counter()
            self._read += len(job.prompt)
            self._searched += len(job.prompt) * job.texts[0].sequence.reads_cache
            self._found += job.texts[0].sequence.cached_tokens or 0
            piece = piece._replace(prompt_logprobs=job.prompt_logprobs)
        if piece.finish_reason is not None:
            if text is job.texts[0]:
                job.first_end = time.perf_counter()
            self._forget(text)
            if job.finished:
                piece = piece._replace(ending=job.ending())
                self._end(job)
        if piece.ending is not None or not job.sink.whole:
            self._outbox.append((job.sink, piece))

    def _observe(self, on_step: Callable[[StepRecord], None], plan: Plan) -> None:
        try:
            on_step(self._record(plan))
        except Exception as error:  # noqa: BLE001  (an observer's fault is not the requests')
            self._on_step = None
            warnings.warn(
                f"on_step raised {type(error).__name__}: {error}. It is not called any more.",
                RuntimeWarning,
                stacklevel=1,
            )

    def _record(self, plan: Plan) -> StepRecord:
        def who(sequence: Sequence) -> tuple[int, int]:
            text = self._texts[sequence]
            return text.job.number, text.generation.index

        return StepRecord(
            tuple((*who(sequence), count) for sequence, count in plan.parts),
            tuple(who(sequence) for sequence in plan.preempted),
        )
