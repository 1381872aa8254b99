"""The formulas of the coherence benchmark by hand, and its measurements against the engine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elastic_moe.engine import Engine
from elastic_moe.errors import CorpusError
from experiments.science import coherence
from experiments.science.coherence_picture import coherence_figure, write_picture
from experiments.science.formulas import (
    by_position,
    distinct_share,
    divergence,
    equal_share,
    errors_by_position,
    first_difference,
    mean_and_error,
    perplexity,
    repeated_share,
)
from experiments.science.report import coherence_table

# --- formulas


def test_repeated_ngrams_are_counted_within_a_text() -> None:
    assert repeated_share([[1, 2, 3, 4, 5, 6]], 4) == 0
    assert repeated_share([[1, 2, 1, 2, 1, 2, 1]], 4) == pytest.approx(1 - 2 / 4)
    assert repeated_share([[7] * 13], 4) == pytest.approx(1 - 1 / 10)
    # Two equal texts repeat nothing of their own.
    assert repeated_share([[1, 2, 3, 4, 5]] * 2, 4) == 0
    assert repeated_share([[7] * 13, [1, 2, 3, 4, 5]], 4) == pytest.approx(0.45)


def test_distinct_ngrams_are_counted_over_all_texts() -> None:
    assert distinct_share([[1, 2, 3], [1, 2, 4]], 1) == pytest.approx(4 / 6)
    assert distinct_share([[1, 2, 3], [1, 2, 4]], 2) == pytest.approx(3 / 4)
    assert distinct_share([[1, 2, 3], [1, 2, 3]], 3) == pytest.approx(1 / 2)


def test_the_first_difference_counts_the_tokens_before_it() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) == 3
    assert first_difference([1, 2, 3], [0, 2, 3]) == 0
    assert first_difference([1, 2, 3, 4], [1, 2, 9, 4]) == 2
    with pytest.raises(ValueError, match="longer"):
        first_difference([1, 2], [1, 2, 3])


def test_equal_tokens_are_counted_place_by_place() -> None:
    assert equal_share([1, 2, 3, 4], [1, 9, 3, 9], 4) == 0.5
    assert equal_share([1, 2, 3, 4], [9, 1, 2, 3], 4) == 0
    assert equal_share([1, 2, 3, 4], [1, 9, 9, 9], 1) == 1


def test_divergence_is_over_the_pairs() -> None:
    found = divergence([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 3, 4], [5, 0, 7, 0]], (2, 4))
    assert found == {
        "first_difference": 2.5,
        "first_differences": [4, 1],
        "never": 0.5,
        "equal": {"2": 0.75, "4": 0.75},
    }


def test_perplexity_is_over_all_tokens() -> None:
    nats = np.log(np.array([[2.0, 8.0], [2.0, 8.0]]))
    assert perplexity(nats) == pytest.approx(4.0)


def test_positions_are_averaged_over_windows_and_their_errors_taken_over_them() -> None:
    values = np.array([[1.0, 3.0, 5.0, 5.0], [3.0, 5.0, 5.0, 5.0], [5.0, 7.0, 5.0, 5.0]])
    assert by_position(values, (0, 2, 4)) == [4.0, 5.0]
    # Means of the windows: 2, 4, 6; sd 2.
    assert errors_by_position(values, (0, 2, 4)) == [pytest.approx(2 / math.sqrt(3)), 0.0]
    mean, error = mean_and_error(values[:, :2])
    assert (mean, error) == (4.0, pytest.approx(2 / math.sqrt(3)))


# --- what is measured

LENGTH, TRAINED = 128, 64


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that the tiny checkpoint has."""
    for name, value in {
        "BUNDLES": {"full": (6, 4), "k1": (6,), "L4-k2": (4,)},
        "LENGTH": LENGTH,
        "BIN": 32,
        "TRAINED": TRAINED,
        "STRIDE": TRAINED // 2,
        "WINDOWS": 3,
        "PROMPTS": 3,
        "PROMPT_TOKENS": 8,
        "NEW_TOKENS": 64,
        "SEEN_EDGES": (0, 16, 64),
    }.items():
        monkeypatch.setattr(coherence, name, value)


def some_windows(count: int, length: int) -> list[list[int]]:
    ids = np.random.default_rng(0).integers(100, 4000, size=(count, length))
    return [list(map(int, row)) for row in ids]


def plain(engine: Engine, ids: list[int], name: str) -> torch.Tensor:
    """Log-probabilities of what follows BOS and all ids but the last, by the engine's own call."""
    bos = list(engine.tokenizer.prefix[:1])
    return torch.from_numpy(engine.score([*bos, *ids][: len(ids)], name)).double().log_softmax(-1)


@pytest.mark.usefixtures("small")
def test_scores_are_those_of_the_engine(tiny: Engine) -> None:
    windows = some_windows(3, 40)
    found = coherence.score(tiny, coherence.BUNDLES, windows)
    assert list(found) == ["full", "L4", "k1", "L4-k2"]
    for name, scored in found.items():
        for w, ids in enumerate(windows):
            full, own = plain(tiny, ids, "full"), plain(tiny, ids, name)
            nats = -own.gather(1, torch.tensor(ids)[:, None]).squeeze(1)
            np.testing.assert_allclose(scored.nats[w], nats.numpy(), atol=2e-4)
            kl = (full.exp() * (full - own)).sum(1)
            np.testing.assert_allclose(scored.kl[w], kl.numpy(), atol=2e-4)
    assert np.abs(found["full"].kl).max() < 1e-5
    assert found["L4"].kl.mean() > 0.01


@pytest.mark.usefixtures("small")
def test_a_long_context_is_compared_with_a_short_one_on_the_same_tokens(tiny: Engine) -> None:
    windows = some_windows(3, LENGTH)
    found = coherence.measure_positions(tiny, windows)
    for name in ("full", "L4-k2"):
        long, short = [], []
        for ids in windows:
            far = plain(tiny, ids, name)
            for position in range(LENGTH - TRAINED, LENGTH):
                long.append(-float(far[position, ids[position]]))
                # 32 to 63 tokens of context, in two stretches.
                start = 32 if position < 96 else 64
                near = plain(tiny, ids[start : position + 1], name)
                short.append(-float(near[-1, ids[position]]))
        expected = float(np.mean(long) - np.mean(short))
        assert found[name]["long_context"]["nats"] == pytest.approx(expected, abs=2e-3)
    assert found["full"]["lost"] == [0.0] * 4
    assert found["full"]["standard_error"] == [0.0] * 4
    nats = coherence.score(tiny, coherence.BUNDLES, windows)["k1"].nats
    assert found["k1"]["nats"][1] == pytest.approx(nats[:, 32:64].mean(), abs=1e-3)
    assert found["k1"]["within"] == pytest.approx(nats[:, :64].mean(), abs=1e-3)
    assert found["k1"]["beyond"] == pytest.approx(nats[:, 64:].mean(), abs=1e-3)


def test_stretches_lie_within_pieces_and_are_spread_over_them() -> None:
    pieces = [list(range(100, 125)), list(range(200, 209)), list(range(300, 330))]
    assert coherence.stretches(pieces, 5, 10) == [
        list(range(start, start + 10)) for start in (100, 110, 300, 310, 320)
    ]
    assert [ids[0] for ids in coherence.stretches(pieces, 2, 10)] == [100, 300]
    with pytest.raises(CorpusError, match="5 stretches of 10 tokens, 6 are needed"):
        coherence.stretches(pieces, 6, 10)


@pytest.mark.usefixtures("small")
def test_what_is_written_is_compared_with_the_full_network(tiny: Engine) -> None:
    prompts = some_windows(4, 8)
    human = some_windows(4, 64)
    found = coherence.measure_writing(tiny, prompts, human)
    assert list(found) == ["human", "full", "L4", "k1", "L4-k2"]
    assert found["full"]["divergence"]["first_differences"] == [64] * 4
    assert found["full"]["divergence"]["kl_along_full"] == [0.0, 0.0]
    assert found["human"]["text"]["distinct_3"] == 1.0
    for name in ("L4", "k1"):
        greedy = [
            tiny.generate([0, *ids], name, coherence.SamplingParams(64, ignore_eos=True)).token_ids
            for ids in prompts
        ]
        whole = [
            tiny.generate([0, *i], None, coherence.SamplingParams(64, ignore_eos=True)).token_ids
            for i in prompts
        ]
        expected = divergence(whole, greedy)
        assert found[name]["divergence"].items() >= expected.items()
        assert found[name]["greedy"]["repeated_4"] == pytest.approx(
            repeated_share(greedy, 4), abs=1e-4
        )
        nats = [
            -float(plain(tiny, [*prompt, *text], "full")[8 + i, token])
            for prompt, text in zip(prompts, greedy, strict=True)
            for i, token in enumerate(text)
        ]
        reported = found[name]["greedy"]["perplexity_under_full"]
        assert reported == pytest.approx(math.exp(np.mean(nats)), rel=2e-3)


@pytest.mark.usefixtures("small")
def test_texts_are_sampled_as_the_engine_samples_each_by_its_own_seed(tiny: Engine) -> None:
    prompts = some_windows(3, 8)
    found = coherence.write_texts(tiny, ["full", "k1"], prompts)
    assert coherence.TEMPERATURE == 0.8
    for name, texts in found["sampled"].items():
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            how = coherence.SamplingParams(64, temperature=0.8, seed=i, ignore_eos=True)
            assert text == list(tiny.generate([0, *prompt], name, how).token_ids)
    assert found["sampled"]["k1"] != found["greedy"]["k1"]
    # Only its seed and not the prompt makes the last text what it is.
    again = coherence.write_texts(tiny, ["full"], [prompts[2]] * 3)["sampled"]["full"]
    assert again[2] == found["sampled"]["full"][2]
    assert again[0] != again[1] != again[2]


@pytest.mark.usefixtures("small")
def test_human_text_is_what_follows_its_prompt(
    tiny: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, list[list[int]]] = {}

    def keep(_engine: Engine, prompts: list[list[int]], human: list[list[int]]) -> None:
        given.update(prompts=prompts, human=human)

    monkeypatch.setattr(coherence, "measure_writing", keep)
    monkeypatch.setattr(coherence, "measure_positions", lambda *_: {})
    line = coherence.measure(tiny, None)
    _, tokens = coherence.read_texts(tiny, None)
    (pieces,) = tokens.values()
    whole = [[*p, *h] for p, h in zip(given["prompts"], given["human"], strict=True)]
    assert whole == coherence.stretches(pieces, 3, 8 + 64)
    assert {len(prompt) for prompt in given["prompts"]} == {8}
    assert line["temperature"] == 0.8


def test_a_novel_that_is_not_utf8_is_refused_by_name(tmp_path: Path, tiny: Engine) -> None:
    (tmp_path / "Chesterton_Cafe_1900.txt").write_bytes(b"x" * 40_000 + b"caf\xe9")
    with pytest.raises(CorpusError, match=r"Chesterton_Cafe_1900.txt is not UTF-8: .* byte 40,003"):
        coherence.read_texts(tiny, tmp_path)


@pytest.mark.usefixtures("small")
def test_the_whole_line_is_drawn_and_told(tiny: Engine, tmp_path: Path) -> None:
    line = coherence.measure(tiny, None)
    assert line["texts"]["python-language-reference"]["windows"] == 3
    figure = coherence_figure(line)
    full, lost, differs = figure.axes
    assert len(lost.lines) == 4
    assert len(differs.lines) == 3
    assert len(full.lines) == 3
    assert lost.get_ylim()[0] > lost.get_ylim()[1]  # what loses more stands lower
    check_survival(differs, line)
    write_picture(line, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    rows = coherence_table(line).splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == [
        "human text",
        *("`full`", "`L4`", "`k1`", "`L4-k2`"),
    ]
    assert all(row.count("|") == rows[0].count("|") for row in rows)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("lost", [0.0, -0.02])
def test_a_text_on_which_nothing_is_lost_has_axes_too(tiny: Engine, lost: float) -> None:
    line = coherence.measure(tiny, None)
    for at in line["positions"]["python-language-reference"].values():
        at["lost"] = [lost for _ in at["lost"]]
        at["nats"] = [4.0 for _ in at["nats"]]
    full, below, _ = coherence_figure(line).axes
    assert full.get_ylim()[0] > 4.0 > full.get_ylim()[1]
    assert below.get_ylim()[0] > 0.0 >= lost > below.get_ylim()[1]


def check_survival(axes: Any, line: dict[str, Any]) -> None:
    """Where a curve is at n, that share of answers had no difference in its first n tokens."""
    names = [name for name in line["writing"] if name not in ("human", "full")]
    for name, drawn in zip(names, axes.lines, strict=True):
        firsts = line["writing"][name]["divergence"]["first_differences"]
        for n, share in zip(*drawn.get_data(), strict=True):
            assert share == sum(first >= n for first in firsts) / len(firsts)
