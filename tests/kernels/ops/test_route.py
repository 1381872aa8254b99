"""The C++ router against a float64 run of the reference, at every level this machine runs."""

from __future__ import annotations

import pytest
import torch
from elastic_moe_kernels import native, ops, reference
from elastic_moe_kernels.ops.route import route_native
from torch import Tensor

from tests.kernels.ops.route_cases import CASES, MIXED, Case, Entry, comparable, make_table


def bits(topk_ids: Tensor, topk_weights: Tensor) -> tuple[list[list[int]], list[list[int]]]:
    """For comparing bit for bit, NaN included."""
    return topk_ids.tolist(), topk_weights.view(torch.int32).tolist()


def test_this_machine_runs_a_level() -> None:
    assert native.levels(), native.missing()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_agrees_with_the_float64_reference(case: Case, level: str) -> None:
    logits, table, rows, bias = case.build()
    options = dict(case.options, correction_bias=bias)
    doubled = dict(options, correction_bias=None if bias is None else bias.double())
    want_ids, want = reference.route(logits.double(), table, rows, **doubled)
    _, same_dtype = reference.route(logits, table, rows, **options)
    ids, weights = route_native(logits, table, rows, level=level, **options)

    assert ids.dtype == torch.int32
    assert weights.dtype == torch.float32
    assert ids.shape == weights.shape == (case.rows, max(entry.k for entry in case.entries))
    clear = comparable(logits, table, rows, bias)
    assert clear.sum() >= case.rows * 0.5, "too few rows have a gap at their cuts to say anything"
    assert torch.equal(ids[clear], want_ids[clear])
    error = (weights.double() - want)[clear].abs()
    allowed = 2 * (same_dtype.double() - want)[clear].abs().amax(0) if case.rows else 0
    assert (error <= allowed + 3e-7).all(), f"off by {error.max():.2e}"
    assert (weights[ids < 0] == 0).all()


def test_equal_scores_go_to_the_lower_index(level: str) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randint(0, 3, (400, 29), generator=generator).float()
    table, rows = make_table(29, MIXED), torch.arange(400) % len(MIXED)
    want, _ = reference.route(logits, table, rows, renormalize=True)
    got, _ = route_native(logits, table, rows, renormalize=True, level=level)
    assert torch.equal(got, want)


def test_equal_scores_go_to_the_lower_index_among_many(level: str) -> None:
    table = make_table(200, [Entry(k=70, threshold=1.0)])
    ids, weights = route_native(
        torch.zeros(1, 200), table, torch.zeros(1, dtype=torch.int64), renormalize=True, level=level
    )
    assert ids[0].tolist() == list(range(70))
    assert torch.allclose(weights, torch.full((1, 70), 1 / 70))


def test_bias_selects_but_does_not_weigh(level: str) -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    bias = torch.tensor([-9.0, 0.0, 0.0, 9.0])
    ids, weights = route_native(
        logits,
        make_table(4, [Entry(k=2)]),
        torch.tensor([0]),
        renormalize=False,
        correction_bias=bias,
        level=level,
    )
    assert ids.tolist() == [[1, 3]]  # selected by bias, ordered and weighed by score
    assert torch.allclose(weights[0], logits.softmax(-1)[0, [1, 3]])


def test_threshold_is_relative_to_the_best_selected(level: str) -> None:
    # Expert 0 has the best score but is biased out, so the bar is half of expert 1's score.
    logits = torch.tensor([[0.9, 0.4, 0.19, 0.3]]).log()
    bias = torch.tensor([-9.0, 0.0, 0.0, 0.0])
    table = make_table(4, [Entry(k=3, threshold=0.5)])
    arguments = (logits, table, torch.tensor([0]))
    ids, _ = route_native(*arguments, renormalize=True, correction_bias=bias, level=level)
    assert ids.tolist() == [[1, 3, -1]]


def test_row_does_not_depend_on_its_batch(level: str) -> None:
    case = Case(97, 29, MIXED, biased=True)
    logits, table, rows, bias = case.build()
    options = {"renormalize": True, "correction_bias": bias, "level": level}
    whole = bits(*route_native(logits, table, rows, **options))
    backwards = bits(*route_native(logits.flip(0), table, rows.flip(0), **options))
    assert whole == (backwards[0][::-1], backwards[1][::-1])
    for t in range(case.rows):
        alone = bits(*route_native(logits[t : t + 1], table, rows[t : t + 1], **options))
        assert alone == (whole[0][t : t + 1], whole[1][t : t + 1])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("num_rows", [1, 2, 3, 2047, 4096])
def test_thread_count_changes_nothing(level: str, num_rows: int) -> None:
    logits, table, rows, _ = Case(num_rows, 64, [Entry(k=8), Entry(k=3, threshold=0.6)]).build()
    results = []
    for count in (1, 2, 3):
        options = {"renormalize": True, "level": level, "threads": count}
        results.append(bits(*route_native(logits, table, rows, **options)))
    assert results[0] == results[1] == results[2]


def test_pool_equals_a_model_without_the_other_experts(level: str) -> None:
    pool = (0, 1, 4, 9, 16, 25, 36, 49)
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(40, 64, generator=generator)
    rows = torch.zeros(40, dtype=torch.int64)
    options = {"renormalize": True, "level": level}
    pooled = route_native(logits, make_table(64, [Entry(k=3, pool=pool)]), rows, **options)
    cut = logits[:, list(pool)].contiguous()
    small = route_native(cut, make_table(len(pool), [Entry(k=3)]), rows, **options)
    assert torch.equal(pooled[0], torch.tensor(pool, dtype=torch.int32)[small[0].long()])
    assert bits(*pooled)[1] == bits(*small)[1]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("where", ["inside", "outside", "everywhere"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_unordered_logits_do_as_the_reference(
    level: str, poison: float, where: str, biased: bool
) -> None:
    logits, table, rows, bias = Case(60, 29, MIXED, biased=biased).build()
    columns = {"inside": [1, 11], "outside": [12, 28], "everywhere": range(29)}[where]
    logits[::2, list(columns)] = poison
    options = {"renormalize": True, "correction_bias": bias}
    want_ids, want = reference.route(logits, table, rows, **options)
    ids, weights = route_native(logits, table, rows, level=level, **options)
    assert torch.equal(ids, want_ids)
    assert torch.equal(weights.isnan(), want.isnan())
    assert ((ids >= -1) & (ids < 29)).all()
    unpoisoned = [t for t in range(60) if t % 2]
    clean, *rest = Case(60, 29, MIXED, biased=biased).build()
    alone, _ = route_native(clean, *rest[:2], level=level, **options)
    assert torch.equal(ids[unpoisoned], alone[unpoisoned])


def test_extreme_logits_stay_in_range(level: str) -> None:
    logits = torch.tensor([[3.4e38, -3.4e38, 0.0, 1e-45], [-3.4e38] * 4, [-1e4, 0.0, -88.0, -87.0]])
    table, rows = make_table(4, [Entry(k=4)]), torch.tensor([0, 0, 0])
    ids, weights = route_native(logits, table, rows, renormalize=True, level=level)
    want_ids, want = reference.route(logits, table, rows, renormalize=True)
    assert torch.equal(ids[:2], want_ids[:2])
    assert ids[2, :2].tolist() == [1, 3]
    assert torch.allclose(weights, want)
    assert weights.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_both_index_types(level: str, dtype: torch.dtype) -> None:
    logits, table, rows, _ = CASES["mixed-subnets"].build()
    want = route_native(logits, table, rows, renormalize=True, level=level)
    got = route_native(logits, table, rows.to(dtype), renormalize=True, level=level)
    assert bits(*got) == bits(*want)


def test_overwritten_table_stays_in_range(level: str) -> None:
    """A table is checked when made; if written to later, results are void but nothing breaks."""
    logits, table, rows, _ = Case(50, 16, [Entry(k=4), Entry(k=2)]).build()
    table.min_experts.fill(1000)
    table.pool[0, 2:] = False  # fewer members than k
    table.pool[1] = False
    table.threshold.fill(float("nan"))
    ids, _ = route_native(logits, table, rows, renormalize=True, level=level)
    assert ((ids >= -1) & (ids < 16)).all()
    assert (ids[1::2] == -1).all()


def test_cpu_and_auto_run_the_same_code() -> None:
    logits, table, rows, _ = CASES["mixed-subnets"].build()
    named = ops.route(logits, table, rows, renormalize=True, implementation="cpu")
    chosen = ops.route(logits, table, rows, renormalize=True)
    assert bits(*named) == bits(*chosen)
