"""What is timed, what is divided by what, and that runners do the same work."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from elastic_moe_kernels import native
from numpy.typing import NDArray

from elastic_moe.engine import Engine
from elastic_moe.errors import BenchmarkError, EngineError
from elastic_moe.lab.bench import bench as module
from elastic_moe.lab.bench.batch import Batch, Work
from elastic_moe.lab.bench.bench import bench, cases, check_batch
from elastic_moe.lab.bench.limits import Limits, LimitsProbe
from elastic_moe.routing import Subnet

IDS = list(range(3, 900))


@pytest.mark.parametrize("name", ["full", "L3-k1-w2-t0.5-p4"])
def test_batches_give_the_same_logits_on_every_runner(
    tiny: Engine, tiny_reference: Engine, name: str
) -> None:
    subnet = tiny.resolve(name)
    native, reference = Batch(tiny.runner), Batch(tiny_reference.runner)
    assert (native.backend, reference.backend) == ("cpu", "reference")
    assert reference.level is None
    contexts = [IDS[start : start + 20] for start in (0, 20, 40)]
    for _ in range(2):  # a second start forgets the first
        got, want = native.start(contexts, subnet), reference.start(contexts, subnet)
        assert got.shape == (3, tiny.config.vocab_size)
        assert np.allclose(got, want, atol=1e-4, rtol=1e-4)
        for token in (7, 8):
            got, want = native.decode([token] * 3), reference.decode([token] * 3)
            assert np.allclose(got, want, atol=1e-4, rtol=1e-4)
    work = native.work()
    assert work is not None
    assert 0 < work.weight_bytes < work.touched_bytes
    assert reference.work() is None


def test_a_batch_asks_for_one_token_per_sequence(tiny: Engine) -> None:
    batch = Batch(tiny.runner)
    with pytest.raises(EngineError, match="1 tokens for 0 sequences"):
        batch.decode([3])


def test_what_computes_something_else_is_not_timed(tiny: Engine, tiny_reference: Engine) -> None:
    full, reference = tiny.resolve(None), Batch(tiny_reference.runner)
    assert check_batch(Batch(tiny.runner), reference, full, IDS, "float32") < 1e-4

    class Broken(Batch):
        def decode(self, ids: Any) -> NDArray[np.float32]:
            return super().decode(ids) * float("nan")

    with pytest.raises(BenchmarkError, match="Nothing was timed"):
        check_batch(Broken(tiny.runner), reference, full, IDS, "float32")


@pytest.fixture(scope="module")
def tiny_reference(tiny_folder: Path) -> Engine:
    return Engine.from_pretrained(tiny_folder, backend="reference", dtype="float32")


class FakeBatch:
    """Counts calls; its clock moves by what each call is said to take."""

    backend, level = "cpu", "avx512"
    runner = SimpleNamespace(threads=2)

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[int, int]] = []
        self.sequences = 0

    def start(self, contexts: Any, subnet: Subnet) -> NDArray[np.float32]:  # noqa: ARG002
        self.sequences = len(contexts)
        self.calls.append((len(contexts), len(contexts[0])))
        self.now += 2.0
        return np.zeros(1, np.float32)

    def decode(self, ids: Any) -> NDArray[np.float32]:
        assert len(ids) == self.sequences
        self.calls.append((len(ids), 1))
        self.now += 0.25 if len(ids) == 1 else 0.5
        return np.zeros(1, np.float32)

    def work(self) -> Work:
        return Work(weight_bytes=90, kv_bytes=10, flops=1000, mean_experts=2.0)


def test_rates_and_shares_of_a_made_up_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = FakeBatch()
    fixed = Limits(800.0, 900.0, 1000.0, "float32", 2)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: runner.now))
    monkeypatch.setattr(
        module, "LimitsProbe", lambda *_, **__: SimpleNamespace(measure=lambda **_: fixed)
    )
    seen: list[Any] = []
    result = bench(
        runner,
        None,  # type: ignore[arg-type]
        IDS,
        max_positions=4096,
        quick=True,
        started=seen.append,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [fixed, (1, 2), (2, 2)]
    assert result["prefill_tokens_per_second"] == 512 / 2.0
    assert result["decode_tokens_per_second"] == 1 / 0.25
    assert result["decode16_tokens_per_second"] == 16 / 0.5
    for case in ("prefill", "decode", "decode16"):
        key = f"{case}_tokens_per_second"
        assert result[f"{key}_min"] == result[key] == result[f"{key}_max"]
    assert set(result["load"]) == {"other_threads_mean", "other_threads_max", "busy"}
    assert result["decode_touched_bytes"] == 100
    assert result["decode_share_of_read"] == 100 / 0.25 / 800
    assert result["decode16_share_of_read"] == 100 / 0.5 / 800
    assert result["prefill_share_of_matmul"] == 1000 / 2.0 / 1000
    one_round = [(1, 512)] * 3 + [(1, 64)] + [(1, 1)] * 5 + [(16, 32)] + [(16, 1)] * 3
    assert runner.calls == one_round * 2


def test_a_speed_is_the_median_of_its_rounds_between_the_slowest_and_the_fastest() -> None:
    limits = Limits(1.0, 1.0, 1.0, "float32", 2)
    samples = [module.Sample(seconds, None, limits) for seconds in (0.5, 4.0, 1.0)]
    entries = module._summarize(module.Case("decode", 2, 64, 8), samples)
    assert entries == {
        "decode_tokens_per_second": 2.0,
        "decode_tokens_per_second_min": 0.5,
        "decode_tokens_per_second_max": 4.0,
    }


def test_a_model_with_few_positions_is_timed_on_what_it_has() -> None:
    assert cases(200, quick=True)[0].context == 200
    with pytest.raises(BenchmarkError, match="the model has 60 positions"):
        cases(60, quick=True)


def test_limits_are_those_of_reads_and_of_a_multiplication() -> None:
    probe = LimitsProbe("float32", read_bytes=1 << 22, multiply_seconds=0.001)
    limits = probe.measure(reads=2, multiplies=1)
    assert limits.dtype == "float32"
    assert limits.threads == native.default_threads()
    assert min(limits.read_bytes_per_second, limits.read_huge_bytes_per_second) > 1e8
    assert limits.matmul_flops_per_second > 1e6
    assert set(limits.to_json()) >= {"read_bytes_per_second", "matmul_flops_per_second"}
