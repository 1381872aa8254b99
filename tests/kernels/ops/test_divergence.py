"""C++ divergence against a float64 run of the reference, at every level."""

from __future__ import annotations

import pytest
import torch
from elastic_moe_kernels import ops, reference
from torch import Tensor

from tests.kernels.compare import assert_as_good, assert_same_bits

# T rows, V columns
SHAPES = {
    "one-row": (1, 64),
    "no-row": (0, 64),
    "one-token": (7, 1),
    "less-than-a-vector": (3, 3),
    "prime": (13, 127),
    "one-past-four-vectors": (5, 65),
    "elastic-mini": (70, 4096),
    "a-large-vocabulary": (5, 50_304),
}


def draw(rows: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, others that are near them, and targets."""
    generator = torch.Generator().manual_seed(rows + vocab)
    logits = 4 * torch.randn(rows, vocab, generator=generator)
    other = logits + 0.3 * torch.randn(rows, vocab, generator=generator)
    return logits, other, torch.randint(vocab, (rows,), generator=generator)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_agrees_with_the_float64_reference(shape: tuple[int, int], level: str) -> None:
    logits, other, targets = draw(*shape)
    losses, kl, agreed = ops.divergence(logits, other, targets, implementation="cpu", level=level)
    want, want_kl, want_agreed = reference.divergence(logits.double(), other.double(), targets)
    same, same_kl, _ = reference.divergence(logits, other, targets)
    assert (losses.dtype, kl.dtype, agreed.dtype) == (torch.float32, torch.float64, torch.bool)
    assert_as_good(losses, same, want, little=3e-7)
    assert_as_good(kl, same_kl, want_kl, little=1e-6)
    assert torch.equal(agreed, want_agreed)
    assert shape[1] < 100 or not len(kl) or float((kl - want_kl).abs().max()) < 1e-6


def test_rows_are_at_distance_zero_from_themselves(level: str) -> None:
    logits, _, targets = draw(9, 1000)
    _, kl, agreed = ops.divergence(logits, logits, targets, implementation="cpu", level=level)
    assert kl.eq(0).all()
    assert agreed.all()


def test_far_and_flat_logits_have_losses(level: str) -> None:
    """Differences beyond what exp holds, and rows that say nothing."""
    logits = torch.tensor([[0.0, -300.0, -1e4, 3e38], [7.0] * 4])
    targets = torch.tensor([1, 2])
    losses, kl, _ = ops.divergence(
        logits, logits.flip(0), targets, implementation="cpu", level=level
    )
    assert losses[0] == pytest.approx(3e38)
    assert losses[1] == pytest.approx(torch.log(torch.tensor(4.0)))
    assert kl[1] == pytest.approx(torch.log(torch.tensor(4.0)))


@pytest.mark.usefixtures("threads")
def test_a_row_depends_on_itself_alone(level: str) -> None:
    logits, other, targets = draw(97, 4099)  # enough to be shared among threads
    options = {"implementation": "cpu", "level": level}
    whole = ops.divergence(logits, other, targets, **options)
    for count in (1, 2, 3):
        turned = [part.flip(0).contiguous() for part in (logits, other, targets)]
        for got, want in zip(ops.divergence(*turned, **options, threads=count), whole, strict=True):
            assert torch.equal(got.flip(0), want)
    for t in (0, 50, 96):
        mine = slice(t, t + 1)
        one = ops.divergence(logits[mine], other[mine], targets[mine], **options)
        assert_same_bits(one[0], whole[0][mine])
