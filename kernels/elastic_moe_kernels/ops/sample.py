"""Drawing the next token of each row of logits, and log-probabilities of tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic_moe_kernels import native
from elastic_moe_kernels.arrays import AnyArray, Array, array, like
from elastic_moe_kernels.errors import KernelError
from elastic_moe_kernels.ops import sample_reference
from elastic_moe_kernels.ops.checks import check_array, no_backward
from elastic_moe_kernels.ops.dispatch import Implementation, choose
from elastic_moe_kernels.ops.sample_reference import (
    LOGIT_CHANGE,
    SAMPLING_ROW,
    Changes,
    Ints,
    Logits,
    Masks,
    TokenLogprobs,
)


def sample(
    logits: AnyArray,
    rows: NDArray[np.void],
    *,
    logits_rows: Array | None = None,
    changes: Changes | None = None,
    masks: Masks | None = None,
    implementation: Implementation = "auto",
    level: str | None = None,
    threads: int | None = None,
) -> AnyArray:
    """Draw a token for each of R rows.

    A row's token depends on its logits, values, changes and mask alone, and is the same at every
    level, on any number of threads, and on the reference.

    Logits pass, in this order: repetition penalty (a positive one of a token that was seen is
    divided by it, a negative one multiplied); frequency penalty times count and presence penalty
    (subtracted where count > 0); bias, all in float64 and rounded to float32; the mask; the
    temperature; min_p; top_k; top_p, which keeps tokens until their probabilities reach it, up to
    a millionth. Among equally likely tokens the lower id comes first. A token is never drawn if its
    logit is NaN, or its probability below 2^-40 of the most likely one's.

    Args:
        logits: (n, V) float32, contiguous.
        rows: (R,) `SAMPLING_ROW`.
        logits_rows: (R,) int32 in [0, n), whose logits each row has; None for row i of row i.
        implementation: "auto", "reference" (in numpy) or "cpu".
        level: the instruction-set level of "cpu"; None for `native.level()`.
        threads: that take part at most; None for `default_threads`.

    Returns:
        (R,) int32 in [0, V); -1 where a logit is +inf or no token may come.

    Raises:
        KernelError: an argument is outside what is said above, or the implementation cannot run.
    """
    found = check_array("logits", logits, ("float32",), 2)
    _check_records("rows", rows, SAMPLING_ROW)
    places = _check_rows(found, logits_rows, len(rows))
    if changes is not None:
        _check_changes(changes, len(rows))
    if masks is not None:
        _check_masks(masks, len(rows), found.shape[1])
    count = native.check_threads(threads)
    chosen = choose(implementation, no_backward(found), level, reference_needs_torch=False)
    x: Logits = array(found)
    if chosen == "reference":
        _check_values(x, rows, places, changes, masks)
        return like(logits, sample_reference.sample(x, rows, places, changes, masks))
    token_ids = sample_native(x, rows, places, changes, masks, level=level, threads=count)
    return like(logits, token_ids)


def sample_native(
    logits: Logits,
    rows: NDArray[np.void],
    logits_rows: Ints,
    changes: Changes | None = None,
    masks: Masks | None = None,
    *,
    level: str | None = None,
    threads: int,
) -> Ints:
    """The C++ kernel of `sample`, on arrays whose dtypes and shapes were checked.

    Raises:
        KernelError: a value is out of its range, or the kernels are missing.
    """
    token_ids: Ints = np.empty(len(rows), np.int32)
    answer = native.extension().sample(
        native.level_index(level),
        logits=logits,
        logits_rows=logits_rows,
        rows=_as_bytes(rows),
        changes=None if changes is None else _as_bytes(changes.entries),
        change_ends=None if changes is None else changes.ends,
        masks=None if masks is None else masks.bits,
        mask_rows=None if masks is None else masks.rows,
        token_ids=token_ids,
        threads=threads,
    )
    if answer[0]:
        _refuse(answer, logits, rows, masks)
    return token_ids


def token_logprobs(
    logits: Array,
    token_ids: Array,
    top: int = 0,
    *,
    logits_rows: Array | None = None,
    implementation: Implementation = "auto",
    level: str | None = None,
    threads: int | None = None,
) -> TokenLogprobs:
    """Log-probabilities of a token of each row, and of the most likely ones.

    Args:
        logits: (n, V) float32, contiguous.
        token_ids: (R,) int32 in [0, V).
        top: N, how many of the most likely tokens, in [0, V].
        logits_rows, implementation, level, threads: as of `sample`.

    Returns:
        numpy arrays, within 1e-6 of what float64 gives; NaN where a row has no finite largest
        logit.

    Raises:
        KernelError: an argument is outside what is said above, or the implementation cannot run.
    """
    given = check_array("logits", logits, ("float32",), 2)
    ids: Ints = array(check_array("token_ids", token_ids, ("int32",), 1))
    places = _check_rows(given, logits_rows, len(ids))
    vocab = given.shape[1]
    if not isinstance(top, int) or isinstance(top, bool) or not 0 <= top <= vocab:
        raise KernelError(f"top must be an integer in [0, {vocab}], the tokens, got {top!r:.80}.")
    count = native.check_threads(threads)
    chosen = choose(implementation, no_backward(given), level, reference_needs_torch=False)
    x: Logits = array(given)
    if chosen == "reference":
        _check_ids(x, ids, places)
        return sample_reference.token_logprobs(x, ids, top, places)
    shape = len(ids), top
    found = TokenLogprobs(np.empty(len(ids)), np.empty(shape, np.int32), np.empty(shape))
    answer = native.extension().token_logprobs(
        native.level_index(level),
        logits=x,
        logits_rows=places,
        token_ids=ids,
        logprobs=found.logprobs,
        top_ids=found.top_ids,
        top_logprobs=found.top_logprobs,
        threads=count,
    )
    if answer[0]:
        _refuse(answer, x)
    return found


_REFUSALS = {
    1: "logits_rows[{0}] must be in [0, {rows}], a row of logits, got {1}.",
    2: "rows[{0}] must have temperature >= 0, top_p in (0, 1], min_p in [0, 1], "
    "repetition_penalty > 0 and top_k >= 0, all finite, got {row}.",
    3: "changes of row {0} must be of tokens in [0, {vocab}] with a finite bias, got token {1}.",
    4: "masks.rows[{0}] must be in [-1, {masks}], a mask or -1 for none, got {1}.",
    5: "token_ids[{0}] must be in [0, {vocab}], got {1}.",
}


def _refuse(
    answer: tuple[int, int, int],
    logits: Logits,
    rows: NDArray[np.void] | None = None,
    masks: Masks | None = None,
) -> None:
    """Raise `KernelError` for (what is refused, the row, the value found)."""
    refusal, r, value = answer
    raise KernelError(
        _REFUSALS[refusal].format(
            r,
            value,
            rows=len(logits) - 1,
            vocab=logits.shape[1] - 1,
            row=None if rows is None else rows[r],
            masks=-1 if masks is None else len(masks.bits) - 1,
        )
    )


def _check_values(
    logits: Logits,
    rows: NDArray[np.void],
    logits_rows: Ints,
    changes: Changes | None,
    masks: Masks | None,
) -> None:
    """The checks that the C++ kernel makes by itself, for the reference."""
    penalties = ("repetition_penalty", "frequency_penalty", "presence_penalty")
    for r, row in enumerate(rows):
        if not 0 <= logits_rows[r] < len(logits):
            _refuse((1, r, int(logits_rows[r])), logits, rows, masks)
        if not (
            row["temperature"] >= 0
            and 0 < row["top_p"] <= 1
            and 0 <= row["min_p"] <= 1
            and row["repetition_penalty"] > 0
            and row["top_k"] >= 0
            and all(np.isfinite(row[name]) for name in ("temperature", *penalties))
        ):
            _refuse((2, r, 0), logits, rows, masks)
        if changes is not None:
            own = changes.entries[changes.ends[r - 1] if r else 0 : changes.ends[r]]
            tokens = own["token"]
            bad = (tokens < 0) | (tokens >= logits.shape[1]) | ~np.isfinite(own["bias"])
            if bad.any():
                _refuse((3, r, int(tokens[bad.argmax()])), logits, rows, masks)
        if masks is not None and not -1 <= masks.rows[r] < len(masks.bits):
            _refuse((4, r, int(masks.rows[r])), logits, rows, masks)


def _check_ids(logits: Logits, token_ids: Ints, logits_rows: Ints) -> None:
    """As `_check_values`, for `token_logprobs`."""
    for r, (row, token) in enumerate(zip(logits_rows, token_ids, strict=True)):
        if not 0 <= row < len(logits):
            _refuse((1, r, int(row)), logits)
        if not 0 <= token < logits.shape[1]:
            _refuse((5, r, int(token)), logits)


def _check_records(name: str, records: Any, dtype: np.dtype[Any], dimensions: int = 1) -> None:
    """Raise `KernelError` unless it is a contiguous numpy array of this dtype."""
    if not isinstance(records, np.ndarray):
        raise KernelError(f"{name} must be a numpy array, got {type(records).__name__}.")
    if records.dtype != dtype or records.ndim != dimensions:
        raise KernelError(
            f"{name} must be {dtype} with {dimensions} dimensions, got {records.dtype} with shape "
            f"{records.shape}."
        )
    if not records.flags.c_contiguous:
        raise KernelError(f"{name} must be contiguous. Copy it.")


def _check_rows(logits: Array, logits_rows: Array | None, count: int) -> Ints:
    """Whose logits each of `count` rows has."""
    if not logits.shape[1]:
        raise KernelError("logits must have at least one column, got 0.")
    if logits_rows is None:
        if len(logits) != count:
            raise KernelError(
                f"logits must have a row for each of {count}, got {len(logits)}. "
                f"Or say by logits_rows which row each has."
            )
        return np.arange(count, dtype=np.int32)
    found: Ints = array(check_array("logits_rows", logits_rows, ("int32",), 1))
    _check_length("logits_rows", found, count)
    return found


def _check_length(name: str, array: NDArray[Any], count: int) -> None:
    if len(array) != count:
        raise KernelError(
            f"{name} must have one entry for each of the {count} rows, got {len(array)}."
        )


def _check_changes(changes: Changes, count: int) -> None:
    if not isinstance(changes, Changes):
        raise KernelError(f"changes must be Changes, got {type(changes).__name__}.")
    _check_records("changes.entries", changes.entries, LOGIT_CHANGE)
    _check_records("changes.ends", changes.ends, np.dtype(np.int64))
    _check_length("changes.ends", changes.ends, count)
    ends = changes.ends
    last = int(ends[-1]) if count else 0
    if last != len(changes.entries) or (ends < 0).any() or (np.diff(ends) < 0).any():
        raise KernelError(
            f"changes.ends must ascend to the {len(changes.entries)} entries, got {ends}."
        )


def _check_masks(masks: Masks, count: int, vocab: int) -> None:
    if not isinstance(masks, Masks):
        raise KernelError(f"masks must be Masks, got {type(masks).__name__}.")
    _check_records("masks.bits", masks.bits, np.dtype(np.uint32), 2)
    _check_records("masks.rows", masks.rows, np.dtype(np.int32))
    _check_length("masks.rows", masks.rows, count)
    if masks.bits.shape[1] * 32 < vocab:
        raise KernelError(
            f"masks.bits must have a bit for each of the {vocab} tokens, got "
            f"{masks.bits.shape[1]} words of 32."
        )


def _as_bytes(records: NDArray[np.void]) -> NDArray[np.uint8]:
    """(R, bytes of a record): fields have no name in C++'s view of an array."""
    return records.view(np.uint8).reshape(len(records), records.dtype.itemsize)
