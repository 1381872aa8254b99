"""The fast parts of a training step compute what the readable ones do, gradients included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from elastic_moe.errors import TrainingError
from elastic_moe.model.reference.layers import Linear
from elastic_moe.model.reference.moe import Experts, ExpertsFunction, run_experts
from elastic_moe.train.experts import padded
from elastic_moe.train.experts.grouped import run_experts_grouped
from elastic_moe.train.experts.mixed import attend_bfloat16, multiply_bfloat16, product
from elastic_moe.train.experts.padded import run_experts_padded
from elastic_moe.train.step import loss, optim
from elastic_moe.train.step.loss import head_loss
from elastic_moe.train.step.optim import Muon, orthogonalize
from tests.conftest import TINY


def random_experts() -> Experts:
    """Eight experts of 32 to 16 channels in float64."""
    experts = Experts(TINY).double()
    with torch.no_grad():
        for p in experts.parameters():
            p.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    return experts


def random_case(tokens: int, case: str = "all-run") -> tuple[torch.Tensor, ...]:
    """x (T, D), ids (T, 3) and weights (T, 3) in float64."""
    generator = torch.Generator().manual_seed(0)
    pool = 4 if case == "last-experts-idle" else 8
    ids = torch.stack([torch.randperm(pool, generator=generator)[:3] for _ in range(tokens)])
    weights = torch.rand(tokens, 3, generator=generator, dtype=torch.float64)
    if case == "some-dropped":
        ids[::2, 2] = -1
        ids[1, 1:] = -1
    if case == "one-expert":
        ids[:, 0], ids[:, 1:] = 5, -1
    weights = weights * (ids >= 0)
    x = torch.randn(tokens, 32, generator=generator, dtype=torch.float64)
    return x, ids, weights


@pytest.mark.parametrize("fast", [run_experts_grouped, run_experts_padded])
@pytest.mark.parametrize("channels", [16, 12, 4])
@pytest.mark.parametrize("case", ["all-run", "some-dropped", "last-experts-idle", "one-expert"])
@pytest.mark.parametrize("tokens", [2, 40])
def test_fast_experts_equal_the_reference_and_its_gradients(
    tokens: int, case: str, channels: int, fast: ExpertsFunction
) -> None:
    experts = random_experts()
    results = []
    for run in (run_experts, fast):
        x, ids, weights = random_case(tokens, case)
        x.requires_grad_()
        weights.requires_grad_()
        experts.zero_grad()
        out = run(x, ids, weights, torch.full((tokens,), channels), experts, None)
        out.square().sum().backward()
        kept = weights.grad * (ids >= 0)  # the gradient of a dropped slot's weight means nothing
        results.append([out, x.grad, kept, *(p.grad.clone() for p in experts.parameters())])
    for slow, quick in zip(*results, strict=True):
        torch.testing.assert_close(quick, slow, rtol=1e-9, atol=1e-9)
    assert float(results[0][3].abs().max()) > 0


@pytest.mark.parametrize("fast", [run_experts_grouped, run_experts_padded])
def test_fast_experts_in_bfloat16_round_what_enters_a_product_and_sum_in_float32(
    fast: ExpertsFunction,
) -> None:
    experts = random_experts()
    exact = []
    rounded = []
    for dtype, results in ((torch.float64, exact), (torch.float32, rounded)):
        experts.to(dtype).zero_grad()
        x, ids, weights = (t.to(dtype) if t.is_floating_point() else t for t in random_case(40))
        x.requires_grad_()
        weights.requires_grad_()
        low = torch.bfloat16 if dtype == torch.float32 else None
        out = fast(x, ids, weights, torch.full((40,), 12), experts, low)
        out.square().sum().backward()
        assert out.dtype == x.grad.dtype == dtype
        gradients = (p.grad.clone() for p in experts.parameters())
        results += [out.detach(), x.grad, weights.grad, *gradients]
    for a, b in zip(exact, rounded, strict=True):
        error = float((a - b.double()).norm() / a.norm())
        assert 1e-4 < error < 2e-2  # bfloat16 keeps 8 bits: it was used, and well


@pytest.mark.parametrize("fast", [run_experts_grouped, run_experts_padded])
def test_what_lies_below_bfloat16_makes_no_difference_to_products(fast: ExpertsFunction) -> None:
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(40, 32, generator=generator)
    results = []
    for rounded in (False, True):
        experts = random_experts().float()
        x, ids, weights = (t.float() if t.is_floating_point() else t for t in random_case(40))
        values = [x, grad, *experts.parameters()]
        with torch.no_grad():
            if rounded:
                values = [t.copy_(t.bfloat16()) for t in (x, grad.clone(), *experts.parameters())]
        x.requires_grad_()
        out = fast(x, ids, weights, torch.full((40,), 16), experts, torch.bfloat16)
        out.backward(values[1])
        results.append([out.detach(), x.grad, *(p.grad for p in experts.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("fast", [run_experts_grouped, run_experts_padded])
def test_fast_experts_refuse_two_widths_in_a_batch(fast: ExpertsFunction) -> None:
    x, ids, weights = random_case(4)
    with pytest.raises(TrainingError, match="one width"):
        fast(x, ids, weights, torch.tensor([16, 8, 16, 16]), random_experts(), None)


def test_experts_that_nobody_may_choose_are_padded_by_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = set()

    def watched(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        sizes.add((len(a), len(b)))
        return product(a, b, dtype)

    monkeypatch.setattr(padded, "product", watched)
    x, ids, weights = random_case(40, "last-experts-idle")
    run_experts_padded(x, ids, weights, torch.full((40,), 16), random_experts(), None)
    assert sizes == {(4, 4)}


def random_head(rows: int = 1100) -> tuple[torch.Tensor, ...]:
    """States, head, targets and a teacher's states: (N, D), (V, D), (N,), (N, D) float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 16, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(50, 16, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(0, 50, (rows,), generator=generator)
    teacher = torch.randn(rows, 16, generator=generator, dtype=torch.float64)
    return x, weight, targets, teacher


@pytest.mark.parametrize("share", [None, 0.0, 0.3, 1.0])
def test_head_loss_is_that_of_plain_pytorch_across_chunk_borders(share: float | None) -> None:
    x, weight, targets, teacher = random_head()
    distilled = {} if share is None else {"teacher": teacher, "share": share}
    loss = head_loss(x, weight, targets, **distilled)
    (3 * loss.total).backward()
    found = [loss.total.detach(), loss.cross_entropy, loss.distance, x.grad, weight.grad]
    x.grad = weight.grad = None
    logits = x @ weight.T
    cross_entropy = F.cross_entropy(logits, targets)
    wanted = (teacher @ weight.T).detach().log_softmax(-1)
    distance = F.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="batchmean")
    if share is None:
        total, distance = cross_entropy, torch.zeros_like(distance)
    else:
        total = (1 - share) * cross_entropy + share * distance
    (3 * total).backward()
    expected = [total.detach(), cross_entropy.detach(), distance.detach(), x.grad, weight.grad]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_logits_of_a_few_rows_are_alive_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, targets, teacher = random_head()
    sizes = []

    def watched(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        sizes.append(len(a))
        return product(a, b, dtype)

    monkeypatch.setattr(loss, "product", watched)
    head_loss(x, weight, targets, teacher=teacher, share=0.5)
    assert max(sizes) == loss.CPU_ROWS == 512
    assert len(sizes) == 3 * 4  # three chunks: logits of both, gradients of states and head


def test_head_loss_in_bfloat16_keeps_the_loss_in_float32() -> None:
    x, weight, targets, teacher = random_head()
    exact = head_loss(x, weight, targets, teacher=teacher, share=0.5)
    exact.total.backward()
    low = [t.detach().float().requires_grad_() for t in (x, weight)]
    options = {"teacher": teacher.float(), "share": 0.5, "dtype": torch.bfloat16}
    found = head_loss(*low, targets, **options)
    found.total.backward()
    assert found.total.dtype == torch.float32
    assert found.total.item() == pytest.approx(exact.total.item(), rel=1e-2)
    for a, b in zip(low, (x, weight), strict=True):
        error = float((a.grad.double() - b.grad).norm() / b.grad.norm())
        assert 1e-4 < error < 2e-2


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


def some_parameters() -> list[torch.nn.Parameter]:
    """Wide, tall, square and stacked ones, of which some share a shape, and one had no gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 10), (3, 6, 10), (10, 6), (2, 10, 6), (8, 8), (8, 8), (6, 10), (6, 10)]
    parameters = []
    for shape in shapes:
        p = torch.nn.Parameter(torch.randn(shape, generator=generator))
        p.grad = torch.randn(shape, generator=generator)
        parameters.append(p)
    parameters[-1].grad = None
    return parameters


@pytest.mark.parametrize("most", [1, 200, 1 << 18])
def test_muon_on_all_parameters_is_muon_on_each(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "CPU_NUMBERS", most)
    together, apart = some_parameters(), some_parameters()
    one = Muon(together, lr=0.1, weight_decay=0.05)
    many = [Muon([p], lr=0.1, weight_decay=0.05) for p in apart]
    for _ in range(3):
        one.step()
        for optimizer in many:
            optimizer.step()
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert float(apart[0].detach().sub(some_parameters()[0].detach()).abs().min()) > 0


def test_muon_is_momentum_orthogonalized_and_scaled_by_shape() -> None:
    p = some_parameters()[3]  # two matrices of 10 x 6
    before, gradient = p.detach().clone(), p.grad.clone()
    Muon([p], lr=0.1, momentum=0.9, weight_decay=0.5).step()
    direction = gradient.lerp(0.1 * gradient, 0.9)
    update = orthogonalize(direction.mT).mT * (10 / 6) ** 0.5
    torch.testing.assert_close(p.detach(), before * (1 - 0.05) - 0.1 * update)


@pytest.mark.parametrize(
    ("most", "stacks"),
    [
        (1 << 18, [(2, 8, 8), (3, 6, 10), (5, 6, 10)]),
        (200, [(1, 6, 10), (1, 6, 10), (2, 8, 8), (3, 6, 10), (3, 6, 10)]),  # numbers at a time
    ],
)
def test_muon_works_on_matrices_of_one_shape_together(
    most: int, stacks: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def watched(matrices: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(matrices.shape))
        return orthogonalize(matrices)

    monkeypatch.setattr(optim, "orthogonalize", watched)
    monkeypatch.setattr(optim, "CPU_NUMBERS", most)
    Muon(some_parameters(), lr=0.1).step()
    assert sorted(sizes) == stacks


def test_products_in_bfloat16_have_the_gradients_of_rounded_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 12, generator=generator).requires_grad_()
    layer = Linear(12, 7)
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
    layer.multiply = multiply_bfloat16
    out = layer(x)
    grad = torch.randn(2, 5, 7, generator=generator)
    out.backward(grad)
    low_x, low_w, low_g = (t.detach().bfloat16().double() for t in (x, layer.weight, grad))
    torch.testing.assert_close(out.double(), low_x @ low_w.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), low_g @ low_w, rtol=1e-5, atol=1e-5)
    wanted = low_g.flatten(0, 1).T @ low_x.flatten(0, 1)
    torch.testing.assert_close(layer.weight.grad.double(), wanted, rtol=1e-5, atol=1e-5)
    assert out.dtype == x.grad.dtype == layer.weight.grad.dtype == torch.float32


def test_attention_in_bfloat16_comes_back_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 9, 8, generator=generator) for n in (4, 2, 2))
    options = {"is_causal": True, "enable_gqa": True}
    found = attend_bfloat16(q, k, v, **options)
    exact = F.scaled_dot_product_attention(q, k, v, **options)
    assert found.dtype == torch.float32
    assert 1e-4 < float((found - exact).norm() / exact.norm()) < 2e-2
