"""The strongest opponent that counts alone can make: interpolated modified Kneser-Ney n-grams.

Source: Chen and Goodman 1998, "An empirical study of smoothing techniques for language modeling",
section 3: three discounts per order, lower orders from the number of different words before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elastic_moe.errors import TrainingError
from elastic_moe.train.step.plan import TrainingPlan
from elastic_moe.train.text.tokens import TokenStream

Keys = NDArray[np.uint64]
Numbers = NDArray[np.float64]
MAX_ORDER = 5


@dataclass(frozen=True, slots=True)
class _Order:
    """The n-grams of one length, and what follows each context, both sorted.

    A key holds the ids of an n-gram, the last in its lowest bits; a context is a key without it.
    """

    keys: Keys  # (n,)
    discounted: Numbers  # (n,) count less its discount
    contexts: Keys  # (c,)
    totals: Numbers  # (c,) of the counts
    left_over: Numbers  # (c,) discounts, summed: what the lower order gets


class KneserNey:
    """P(next | up to n - 1 ids before it) for every n up to `order`, fitted on sequences.

    Args:
        sequences: (S, T) ids, each sequence with BOS in front; no n-gram crosses into another.
        vocab_size: ids are below it.
        bos: the id that opens a sequence: what follows it has no word before it to count.
        order: the largest n, at most 5.

    Raises:
        TrainingError: keys of this order and vocabulary do not fit into 64 bits.
    """

    def __init__(
        self, sequences: NDArray[np.integer], vocab_size: int, bos: int, order: int = MAX_ORDER
    ) -> None:
        self.vocab_size, self.order = vocab_size, order
        self.bits = max(1, (vocab_size - 1).bit_length())
        if not 1 <= order <= MAX_ORDER or self.bits * order > 64:
            raise TrainingError(
                f"order must be in [1, {min(MAX_ORDER, 64 // self.bits)}] for {vocab_size} words, "
                f"got {order}."
            )
        opens = sequences == bos
        self._raw: list[_Order] = []
        self._continued: list[_Order] = []
        longer: Keys | None = None
        for n in range(order, 0, -1):
            grams = self._pack(sequences, n)
            keys, counts = np.unique(grams, return_counts=True)
            self._raw.insert(0, self._order(keys, counts))
            if longer is not None:
                # How many different words stand before it; at the beginning of a text none can.
                suffixes = longer & np.uint64((1 << self.bits * n) - 1)
                first = np.unique(grams[opens[:, : opens.shape[1] - n + 1].reshape(-1)])
                known, before = np.unique(suffixes, return_counts=True)
                opening = ~np.isin(first, known)
                keys_now = np.concatenate([known, first[opening]])
                counts_now = np.concatenate([before, counts[np.searchsorted(keys, first[opening])]])
                place = np.argsort(keys_now)
                self._continued.insert(0, self._order(keys_now[place], counts_now[place]))
            longer = keys

    def losses(
        self, inputs: NDArray[np.integer], targets: NDArray[np.integer], order: int
    ) -> Numbers:
        """Nats of every target (S, T) after the inputs up to it, by the model of one order."""
        chance = np.full(targets.shape, 1 / self.vocab_size)
        for n in range(1, order + 1):
            table = (self._raw if n == order else self._continued)[n - 1]
            # A position with fewer than n - 1 ids before it stays with the shorter context.
            whole = np.concatenate([inputs[:, :1], targets], axis=1)
            grams = self._pack(whole, n).reshape(len(whole), -1)
            first = max(0, n - 2)  # of the targets, the first with a whole context
            grams = grams[:, grams.shape[1] - (targets.shape[1] - first) :]
            chance[:, first:] = self._interpolate(table, grams, chance[:, first:])
        nats: Numbers = -np.log(chance)
        return nats

    def _interpolate(self, table: _Order, grams: Keys, lower: Numbers) -> Numbers:
        """p(w|h) = (c(hw) - d) / c(h) + left_over(h) / c(h) * lower; `lower` where h is unknown."""
        contexts = grams >> np.uint64(self.bits)
        h = _find(table.contexts, contexts)
        w = _find(table.keys, grams)
        own = np.where(w >= 0, table.discounted[w], 0.0)
        total = table.totals[h]
        return np.where(h >= 0, (own + table.left_over[h] * lower) / total, lower)

    def _pack(self, ids: NDArray[np.integer], n: int) -> Keys:
        """Keys of all n-grams within the rows of ids (S, T), row by row: (S * (T - n + 1),)."""
        width = ids.shape[1] - n + 1
        keys = np.zeros((len(ids), width), dtype=np.uint64)
        for i in range(n):
            keys <<= np.uint64(self.bits)
            keys |= ids[:, i : i + width].astype(np.uint64)
        return keys.reshape(-1)

    def _order(self, keys: Keys, counts: NDArray[np.integer]) -> _Order:
        discounts = _discounts(counts)
        taken = discounts[np.minimum(counts, 3)]
        contexts, starts = np.unique(keys >> np.uint64(self.bits), return_index=True)
        return _Order(
            keys=keys,
            discounted=counts - taken,
            contexts=contexts,
            totals=np.add.reduceat(counts.astype(np.float64), starts),
            left_over=np.add.reduceat(taken, starts),
        )


def _discounts(counts: NDArray[np.integer]) -> Numbers:
    """D for counts of 0, 1, 2, and 3 or more; 0.5, 1, 1.5 where there is too little to tell."""
    n1, n2, n3, n4 = (int((counts == i).sum()) for i in (1, 2, 3, 4))
    usual = np.array([0.0, 0.5, 1.0, 1.5])
    if min(n1, n2, n3) == 0:
        return usual
    y = n1 / (n1 + 2 * n2)
    found = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    # Nothing left over would make what was never seen impossible.
    sound = (found[1:] > 0).all() and (found <= np.arange(4)).all()
    return found if sound else usual


def _find(table: Keys, wanted: Keys) -> NDArray[np.int64]:
    """Where each wanted key stands in the sorted table, -1 where it does not."""
    place = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return np.where(table[place] == wanted, place, -1)


def fit_kneser_ney(
    stream: TokenStream, plan: TrainingPlan, steps: int, vocab_size: int, order: int = MAX_ORDER
) -> KneserNey:
    """Fitted on the tokens that the first `steps` steps read, each piece once.

    A piece that several epochs read counts once: doubled counts would spoil the discounts.
    """
    pieces = sum(plan.stage(step).pieces for step in range(steps))
    distinct = min(pieces, stream.pieces_per_epoch)
    inputs, targets = stream.batch(0, distinct, stream.piece_tokens)
    sequences = np.concatenate([inputs[:, :1], targets], axis=1)
    return KneserNey(sequences, vocab_size, stream.bos, order)
