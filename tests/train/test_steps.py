"""The fast parts of a training step compute what the readable ones do, gradients included."""

from __future__ import annotations

import pytest
import torch

from elastic_moe.errors import TrainingError
from elastic_moe.model.moe import Experts, run_experts
from elastic_moe.model.transformer import LayerTrace, Trace
from elastic_moe.routing import resolve
from elastic_moe.train.grouped import run_experts_grouped
from elastic_moe.train.loss import balance_loss, head_loss
from elastic_moe.train.mini import ELASTIC_MINI
from elastic_moe.train.optim import Muon, orthogonalize
from tests.conftest import TINY


def random_case(tokens: int, dropped: bool, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(tokens)])
    weights = torch.rand(tokens, 3, generator=generator, dtype=torch.float64)
    if dropped:
        ids[::2, 2] = -1
        ids[1, 1:] = -1
    weights = weights * (ids >= 0)
    x = torch.randn(tokens, 32, generator=generator, dtype=torch.float64)
    return x, ids, weights


@pytest.mark.parametrize("channels", [16, 12, 4])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("tokens", [2, 40])
def test_grouped_experts_equal_the_reference_and_its_gradients(
    tokens: int, dropped: bool, channels: int
) -> None:
    experts = Experts(TINY).double()
    with torch.no_grad():
        for p in experts.parameters():
            p.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    results = []
    for run in (run_experts, run_experts_grouped):
        x, ids, weights = random_case(tokens, dropped)
        x.requires_grad_()
        weights.requires_grad_()
        experts.zero_grad()
        out = run(x, ids, weights, torch.full((tokens,), channels), experts)
        out.square().sum().backward()
        kept = weights.grad * (ids >= 0)  # the gradient of a dropped slot's weight means nothing
        results.append([out, x.grad, kept, *(p.grad.clone() for p in experts.parameters())])
    for slow, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)
    assert float(results[0][3].abs().max()) > 0


def test_grouped_experts_refuse_what_they_cannot_do() -> None:
    experts = Experts(TINY).double()
    x, ids, weights = random_case(4, False)
    with pytest.raises(TrainingError, match="one width"):
        run_experts_grouped(x, ids, weights, torch.tensor([16, 8, 16, 16]), experts)
    with pytest.raises(TrainingError, match="round no inputs"):
        run_experts_grouped(x, ids, weights, torch.full((4,), 16), experts, torch.bfloat16)


def test_head_loss_is_cross_entropy_across_chunk_borders() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1100, 16, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(50, 16, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(0, 50, (1100,), generator=generator)
    loss = head_loss(x, weight, targets)
    (3 * loss).backward()
    found = [loss.detach(), x.grad.clone(), weight.grad.clone()]
    x.grad = weight.grad = None
    expected = torch.nn.functional.cross_entropy(x @ weight.T, targets)
    (3 * expected).backward()
    for a, b in zip(found, [expected.detach(), x.grad, weight.grad], strict=True):
        torch.testing.assert_close(a, b)


def test_balance_is_one_when_experts_share_equally_and_grows_when_they_do_not() -> None:
    shape = ELASTIC_MINI.shape
    subnet = resolve(shape, expert_pool=8)
    even = torch.arange(8).view(2, 4)
    flat = torch.zeros(2, 16)
    assert float(balance_loss(Trace([LayerTrace(0, flat, even)]), subnet)) == pytest.approx(1.0)
    crowded = torch.zeros(2, 16)
    crowded[:, :4] = 5.0
    same = torch.arange(4).expand(2, 4)
    assert float(balance_loss(Trace([LayerTrace(0, crowded, same)]), subnet)) > 1.9
    outside = torch.zeros(2, 16)
    outside[:, 12] = 50.0  # no expert of the pool: must not count
    found = balance_loss(Trace([LayerTrace(0, outside, even)] * 2), subnet)
    assert float(found) == pytest.approx(2.0)


def test_the_balance_loss_has_a_gradient_for_the_router() -> None:
    logits = torch.zeros(2, 16)
    logits[:, :4] = 2.0
    logits.requires_grad_()
    same = torch.arange(4).expand(2, 4)
    balance_loss(Trace([LayerTrace(0, logits, same)]), resolve(ELASTIC_MINI.shape)).backward()
    assert logits.grad is not None
    assert float(logits.grad[:, :4].min()) > 0  # away from the crowded experts
    assert float(logits.grad[:, 4:].max()) < 0


def test_orthogonalize_makes_singular_values_equal_and_keeps_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(3, 16, 40, generator=generator)
    result = orthogonalize(matrices)
    values = torch.linalg.svdvals(result)
    assert 0.5 < float(values.min()) <= float(values.max()) < 1.3
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity(result.flatten(1), (u @ vh).flatten(1))
    assert float(cosine.min()) > 0.95


def test_muon_leaves_parameters_without_gradient_alone() -> None:
    ran, idle = (torch.nn.Parameter(torch.ones(4, 6)) for _ in range(2))
    optimizer = Muon([ran, idle], lr=0.1, weight_decay=0.5)
    ran.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert torch.equal(idle, torch.ones(4, 6))
    assert not torch.equal(ran, torch.ones(4, 6))
