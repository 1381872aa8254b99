"""A table of sub-networks that grows: rows are checked once and stay while they are used."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from elastic_moe_kernels import native
from elastic_moe_kernels.columns import LAYER_COLUMNS, SUBNET_COLUMNS, SubnetColumns
from elastic_moe_kernels.errors import KernelError
from elastic_moe_kernels.table import FIRST_ROWS, GrowingTable

from elastic_moe.routing import Subnet, resolve
from tests.kernels.compare import assert_same_bits
from tests.kernels.step.steps import Piece, Runner, make_model, runner_of, subnets_of, table_of

MODEL = make_model(torch.float32)
SHAPE = MODEL.shape
# All that differ in the layers or in k: more than the first rows.
SUBNETS = [
    resolve(SHAPE, active_layers=[i for i in range(5) if bits >> i & 1], top_k=k)
    for bits in range(1, 32)
    for k in range(1, SHAPE.max_top_k + 1)
]


def table_with(checked: list[SubnetColumns] | None = None) -> GrowingTable:
    check = (lambda _: None) if checked is None else checked.append
    return GrowingTable(SHAPE.num_layers, SHAPE.num_experts, SHAPE.channels_per_granule, check)


def add(table: GrowingTable, subnet: Subnet) -> int:
    return table.add(subnet.fingerprint, subnet.layers)


def assert_row(table: GrowingTable, row: int, subnet: Subnet) -> None:
    want = table_of([subnet])
    for name in SUBNET_COLUMNS:
        assert np.array_equal(getattr(table.columns, name)[row], getattr(want, name)[0]), name


def test_rows_stay_where_they_are_while_the_table_grows() -> None:
    checked: list[SubnetColumns] = []
    table = table_with(checked)
    rows = [add(table, subnet) for subnet in SUBNETS]
    assert sorted(rows) == list(range(len(SUBNETS)))
    assert len(table) == len(SUBNETS) > 2 * FIRST_ROWS
    assert [add(table, subnet) for subnet in SUBNETS] == rows  # once more
    assert [len(one.active) for one in checked] == [1] * len(SUBNETS)
    for row, subnet in zip(rows, SUBNETS, strict=True):
        assert_row(table, row, subnet)


def test_rows_made_in_inference_mode_may_be_written_outside_of_it() -> None:
    with torch.inference_mode():
        table = table_with()
        first = add(table, SUBNETS[0])
    assert_row(table, add(table, SUBNETS[1]), SUBNETS[1])
    assert_row(table, first, SUBNETS[0])


def test_a_row_goes_with_its_last_user() -> None:
    checked: list[SubnetColumns] = []
    table = table_with(checked)
    first, second = add(table, SUBNETS[0]), add(table, SUBNETS[1])
    add(table, SUBNETS[0])
    table.remove(first)
    assert len(table) == 2
    assert add(table, SUBNETS[2]) not in (first, second)
    table.remove(first)
    assert len(table) == 2
    assert (add(table, SUBNETS[0]), len(checked)) == (first, 3)  # nobody has needed its row
    table.remove(first)
    rows = [add(table, subnet) for subnet in SUBNETS[3 : 1 + FIRST_ROWS]]
    assert rows[-1] == first  # the last that lost its users
    assert len(table.columns.active) == FIRST_ROWS == len(table)
    assert_row(table, first, SUBNETS[FIRST_ROWS])
    assert_row(table, second, SUBNETS[1])
    assert add(table, SUBNETS[0]) == FIRST_ROWS


def test_distinct_subnetworks_one_after_the_other_take_one_row() -> None:
    table = table_with()
    columns = table.columns
    for number in range(3000):
        subnet = SUBNETS[number % len(SUBNETS)]
        row = table.add(number, subnet.layers)
        table.remove(row)
        if number == 0:
            columns = table.columns
    assert table.columns is columns
    assert len(columns.active) == FIRST_ROWS
    assert len(table) == 0
    assert len(table._removed) == 0
    kept = (table._row_of, table._key_of, table._users, table._unused)
    assert [len(part) for part in kept] == [FIRST_ROWS] * 4


def test_users_may_leave_from_any_thread() -> None:
    table = table_with()
    rows = [add(table, SUBNETS[number % 7]) for number in range(700)]
    threads = [
        threading.Thread(target=lambda part=part: list(map(table.remove, part)))
        for part in (rows[:350], rows[350:])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(table) == 0


def test_what_the_model_cannot_run_is_refused_and_takes_no_row() -> None:
    runner = runner_of(MODEL, [SUBNETS[0]])
    table = runner.model.new_table(SHAPE.channels_per_granule + 1)  # channels beyond the experts'
    with pytest.raises(KernelError, match=r"channels must be in \[1, 24\].* got 28"):
        add(table, resolve(SHAPE))
    assert len(table) == 0
    other = make_model(torch.float32, num_experts=7).shape
    table = runner.model.new_table(SHAPE.channels_per_granule)
    with pytest.raises((KernelError, IndexError)):
        table.add("other", resolve(other).layers)
    assert len(table) == 0
    layers = resolve(SHAPE).layers
    greedy = replace(layers[2], top_k=SHAPE.num_experts, expert_pool=(0, 1))
    with pytest.raises(
        KernelError, match=r"layer 2: top_k must be in \[1, 2\], the size of its pool"
    ):
        table.add("greedy", [*layers[:2], greedy, *layers[3:]])
    assert len(table) == 0


def test_rows_that_no_token_names_change_nothing() -> None:
    """Neither the bits nor the experts that are traced, whatever else is in the table."""
    subnets = subnets_of(MODEL)

    def run(before: int) -> list[torch.Tensor]:
        runner: Runner = runner_of(MODEL, subnets, sequences=2)
        table = runner.model.new_table(SHAPE.channels_per_granule)
        for subnet in SUBNETS[:before]:
            add(table, subnet)
        rows = [add(table, subnet) for subnet in subnets]
        runner.table = table.columns  # type: ignore[assignment]
        pieces = [Piece(0, (1, 2, 3), 0, rows[1]), Piece(1, (4, 5), 0, rows[0])]
        result = runner.step(pieces, trace=True)
        assert result.topk_ids is not None
        return [result.logits, result.topk_ids]

    want = run(0)
    for got, alone in zip(run(40), want, strict=True):
        assert_same_bits(got, alone)


def test_the_columns_of_a_layer_are_arrays_made_once() -> None:
    """Each array that is made anew costs a call of the router half a microsecond."""
    table = table_of([resolve(SHAPE, top_k=1), resolve(SHAPE)])
    for i in range(SHAPE.num_layers):
        layer = table.layer(i)
        assert layer is table.layer(i)
        for name in LAYER_COLUMNS:
            column = getattr(layer, name)
            assert isinstance(column, np.ndarray)
            assert column is getattr(layer, name)
            assert column.tolist() == getattr(table, name)[:, i].tolist()
    assert table.layer(0).top_k.tolist() == [1, SHAPE.max_top_k]


def test_a_column_that_the_native_step_does_not_read_is_refused() -> None:
    """Columns cross by name: one that is declared in Python alone would mean nothing."""
    table = table_of([resolve(SHAPE)])
    arrays = {name: getattr(table, name) for name in SUBNET_COLUMNS}
    native.extension().SubnetColumns(**arrays)
    with pytest.raises(TypeError):
        native.extension().SubnetColumns(**arrays, another=arrays["top_k"])
