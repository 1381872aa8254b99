"""Quality figures agree with their definitions, computed here the slow way."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch

from elastic_moe.engine import Engine
from elastic_moe.errors import ElasticMoEError
from elastic_moe.lab.sweeps import quality
from elastic_moe.lab.sweeps.quality import FullNetwork, Quality, measure_depths, paired_difference
from elastic_moe.lab.sweeps.text import Corpus, EvaluationSet, evaluation_set
from elastic_moe.routing import Subnet


@pytest.fixture(scope="module")
def text(tiny: Engine) -> EvaluationSet:
    words = " ".join(f"{n} squared is {n * n}," for n in range(400))
    return evaluation_set(Corpus("squares", words), tiny.tokenizer, 512 + 256 * 9)


def measure(
    tiny: Engine, text: EvaluationSet, deepest: Subnet, depths: list[int], full: FullNetwork | None
) -> tuple[dict[int, Quality], FullNetwork]:
    kept = full or FullNetwork(text.scored_tokens, tiny.config.vocab_size)
    passes = list(measure_depths(tiny.runner, text, deepest, depths, kept, is_full=full is None))
    assert [done for done, _ in passes] == [8, 10, 10]
    return passes[-1][1], kept


def slow_logprobs(
    tiny: Engine, text: EvaluationSet, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, wanted = [], []
    for window in text.windows:
        logits = torch.from_numpy(tiny.score(list(window.inputs), name))[window.first_scored :]
        rows.append(logits.double().log_softmax(-1))
        wanted += window.targets[window.first_scored :]
    return torch.cat(rows), torch.tensor(wanted)


def test_one_pass_measures_every_depth_as_scoring_alone_does(
    tiny: Engine, text: EvaluationSet
) -> None:
    measured, kept = measure(tiny, text, tiny.resolve("full"), [6, 4, 2], None)
    reference, wanted = slow_logprobs(tiny, text, "full")
    for depth, name in ((6, "full"), (4, "L4"), (2, "L2")):
        quality = measured[depth]
        expected, _ = slow_logprobs(tiny, text, name)
        losses = -expected.gather(1, wanted[:, None])[:, 0]
        np.testing.assert_allclose(quality.losses, losses.numpy(), atol=2e-4)
        kl = (reference.exp() * (reference - expected)).sum(1).mean()
        assert quality.kl_to_full == pytest.approx(float(kl), abs=1e-4)
        agreed = (expected.argmax(1) == reference.argmax(1)).double().mean()
        assert quality.top1_agreement == pytest.approx(float(agreed), abs=2e-3)
        assert quality.nats_per_token == pytest.approx(float(losses.mean()), abs=1e-5)
        bits = float(losses.sum()) / math.log(2) / text.scored_bytes
        assert quality.bits_per_byte(text.scored_bytes) == pytest.approx(bits, rel=1e-5)
        assert sorted(quality.expert_use) == list(range(depth))
    assert measured[2].kl_to_full > 0.01  # the tiny model's layers matter
    later, _ = measure(tiny, text, tiny.resolve("k1"), [6], kept)  # beside what was kept
    expected, _ = slow_logprobs(tiny, text, "k1")
    kl = (reference.exp() * (reference - expected)).sum(1).mean()
    assert later[6].kl_to_full == pytest.approx(float(kl), abs=1e-4)
    agreed = (expected.argmax(1) == reference.argmax(1)).double().mean()
    assert later[6].top1_agreement == pytest.approx(float(agreed), abs=2e-3)


def test_the_full_network_is_at_distance_zero_from_itself(
    tiny: Engine, text: EvaluationSet
) -> None:
    measured, _ = measure(tiny, text, tiny.resolve("full"), [6], None)
    assert measured[6].kl_to_full == 0.0
    assert measured[6].top1_agreement == 1.0
    assert measured[6].mean_experts == 3.0


def test_mean_experts_counts_what_ran(tiny: Engine, text: EvaluationSet) -> None:
    _, full = measure(tiny, text, tiny.resolve("full"), [6], None)
    measured, _ = measure(tiny, text, tiny.resolve("t1"), [6, 3], full)
    assert measured[6].mean_experts == 1.0
    some, _ = measure(tiny, text, tiny.resolve("t0.5"), [6], full)
    assert 1.0 < some[6].mean_experts < 3.0
    pool, _ = measure(tiny, text, tiny.resolve("k2-p4"), [6], full)
    assert pool[6].mean_experts == 2.0
    assert all(use[4:] == [0.0] * 4 for use in pool[6].expert_use.values())
    assert sum(pool[6].expert_use[0]) == pytest.approx(1.0)


def test_of_a_network_that_routes_nothing_no_expert_ran() -> None:
    assert quality._ExpertUse().mean(6) == 0.0


def test_the_standard_error_is_the_spread_between_windows(text: EvaluationSet) -> None:
    generator = np.random.default_rng(0)
    counts = np.array([w.scored for w in text.windows])
    effect = np.repeat(generator.normal(0.3, 1.0, len(counts)), counts).astype(np.float32)
    noise = generator.normal(0, 0.1, text.scored_tokens).astype(np.float32)

    def quality(losses: np.ndarray) -> Quality:
        return Quality(losses, 0.0, 1.0, 1.0, {})

    base = generator.normal(4, 2, text.scored_tokens).astype(np.float32)
    mean, error = paired_difference(quality(base + effect + noise), quality(base), text)
    assert mean == pytest.approx(float((effect + noise).mean()), abs=1e-4)
    # Independent tokens would give about sd/sqrt(N) = 0.02; whole windows move together.
    assert 0.1 < error < 0.8
    independent = effect[generator.permutation(len(effect))]
    _, smaller = paired_difference(quality(base + independent), quality(base), text)
    assert smaller < error / 3
    assert paired_difference(quality(base), quality(base), text) == (0.0, 0.0)


def test_the_standard_error_is_its_formula(text: EvaluationSet) -> None:
    """With plain loops over windows of unequal size: the first scores more than the others."""
    generator = np.random.default_rng(1)
    a = generator.normal(4, 2, text.scored_tokens).astype(np.float32)
    b = generator.normal(4, 2, text.scored_tokens).astype(np.float32)
    difference = [float(x) - float(y) for x, y in zip(a, b, strict=True)]
    mean = sum(difference) / len(difference)
    at, squares, counts = 0, 0.0, [window.scored for window in text.windows]
    assert len(set(counts)) == 2
    for count in counts:
        squares += (sum(difference[at : at + count]) - mean * count) ** 2
        at += count
    m = len(counts)
    expected = math.sqrt(m / (m - 1) * squares) / len(difference)
    found = paired_difference(Quality(a, 0, 1, 1, {}), Quality(b, 0, 1, 1, {}), text)
    assert found == pytest.approx((mean, expected), rel=1e-9)


def test_one_window_has_no_standard_error(tiny: Engine) -> None:
    words = " ".join(f"{n} squared is {n * n}," for n in range(400))
    one = evaluation_set(Corpus("squares", words), tiny.tokenizer, 700)
    losses = np.ones(one.scored_tokens, np.float32)
    assert paired_difference(
        Quality(losses, 0, 1, 1, {}), Quality(losses * 2, 0, 1, 1, {}), one
    ) == (-1.0, None)


def test_a_disk_without_room_is_named_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quality.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 10))
    with pytest.raises(ElasticMoEError, match=r"needs 7\.3 GB in .* 0\.0 GB are free\. Lower"):
        FullNetwork(12_032, 152_000)
    FullNetwork(1, 2)  # 8 bytes


def test_rows_in_chunks_give_what_all_at_once_gives(
    tiny: Engine, text: EvaluationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = measure(tiny, text, tiny.resolve("full"), [6, 3], None)
    monkeypatch.setattr(quality, "CHUNK_NUMBERS", 100 * tiny.config.vocab_size)
    largest = 0
    logits = tiny.runner.logits

    def watched(states: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, states.shape[0])
        return logits(states)

    monkeypatch.setattr(tiny.runner, "logits", watched)
    chunked, _ = measure(tiny, text, tiny.resolve("full"), [6, 3], None)
    assert largest == 100
    for depth in (6, 3):
        np.testing.assert_allclose(chunked[depth].losses, whole[depth].losses, atol=1e-5)
        assert chunked[depth].kl_to_full == pytest.approx(whole[depth].kl_to_full, abs=1e-6)
        assert chunked[depth].top1_agreement == whole[depth].top1_agreement
        assert chunked[depth].expert_use == whole[depth].expert_use
        assert chunked[depth].mean_experts == whole[depth].mean_experts
