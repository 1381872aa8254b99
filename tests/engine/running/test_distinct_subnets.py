"""Thousands of sub-networks one after the other leave the engine as it was."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
from elastic_moe_kernels import native
from elastic_moe_kernels.table import FIRST_ROWS

from elastic_moe import Engine, SamplingParams
from elastic_moe.engine.request import Request, Sequence
from elastic_moe.engine.running.native import NativeRunner
from elastic_moe.routing import Subnet
from tests.engine.running.test_invariance import random_subnet

pytestmark = pytest.mark.skipif(bool(native.missing()), reason="the C++ kernels are not installed")


def alive() -> dict[type, int]:
    gc.collect()
    objects = gc.get_objects()
    return {
        kind: sum(type(thing) is kind for thing in objects) for kind in (Subnet, Request, Sequence)
    }


def test_distinct_subnetworks_leave_rows_caches_and_objects_as_before(tiny_folder: Path) -> None:
    rng = np.random.default_rng(0)
    params = SamplingParams(max_tokens=1)
    with Engine.from_pretrained(tiny_folder, backend="cpu", kv_cache_bytes=1 << 20) as engine:
        runner = engine.runner
        assert isinstance(runner, NativeRunner)
        engine.generate([5, 6], None, params)
        before, seen = alive(), set()
        for _ in range(2000):
            subnet = random_subnet(engine.shape, rng)
            seen.add(engine.generate([5, 6], subnet, params).routing.fingerprint)
        assert len(seen) > 1990
        engine.score([5, 6], random_subnet(engine.shape, rng))
        core = engine._running_core()
        gc.collect()
        assert core.call(lambda: len(runner._subnets)) == 0
        assert len(runner._subnets.columns.active) == FIRST_ROWS
        assert len(runner._subnets._row_of) <= FIRST_ROWS
        assert core._requests == set()
        assert not core._admission._call_of
        del subnet
        after = alive()
        # The last batch of one token, which the next step might go on with, is all there may be.
        assert all(after[kind] <= before[kind] + 2 for kind in before), (before, after)
        engine.check_integrity()


def test_as_many_subnetworks_as_requests_share_a_table_that_grows(tiny_folder: Path) -> None:
    rng = np.random.default_rng(1)
    params = SamplingParams(max_tokens=3, ignore_eos=True, logprobs=0)
    with Engine.from_pretrained(tiny_folder, backend="cpu", max_num_seqs=40) as engine:
        runner = engine.runner
        assert isinstance(runner, NativeRunner)
        subnets = [random_subnet(engine.shape, rng) for _ in range(60)]
        want = [engine.generate([5, 6, 7], subnet, params).choices for subnet in subnets]
        assert len(runner._subnets.columns.active) == FIRST_ROWS
        got = engine.generate([[5, 6, 7]] * 60, subnets, params)
        assert [completion.choices for completion in got] == want
        rows = len(runner._subnets.columns.active)
        assert rows >= 60
        engine.generate([[5, 6, 7]] * 60, subnets, params)
        assert len(runner._subnets.columns.active) == rows
        assert engine._running_core().call(lambda: len(runner._subnets)) == 0
