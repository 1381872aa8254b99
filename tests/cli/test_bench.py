"""`elastic-moe bench`: its line of JSON, its table, and kernels of the user's own."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from elastic_moe_kernels import native
from numpy.typing import NDArray

from elastic_moe.cli import main
from elastic_moe.lab import load
from elastic_moe.lab.bench.batch import Batch

RATES = ("prefill", "decode", "decode16")
GOOD = """
import torch

def experts(x, topk_ids, topk_weights, gate, up, down):
    out = torch.zeros(x.shape)
    for t in range(len(x)):
        for e, w in zip(topk_ids[t].tolist(), topk_weights[t].tolist()):
            row = x[t].float()
            h = torch.nn.functional.silu(gate[e].float() @ row) * (up[e].float() @ row)
            out[t] += w * (down[e].float() @ h)
    return out

def first_only(x, topk_ids, topk_weights, gate, up, down):
    return experts(x, topk_ids[:, :1], topk_weights[:, :1], gate, up, down)

def nothing(x, *rest):
    return x[:, :3]

def not_a_number(x, *rest):
    return x * float("nan")

def raises(*arguments):
    raise RuntimeError("not today")
"""


@pytest.fixture
def _kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A current folder with a module of kernels."""
    (tmp_path / "kernels_of_mine.py").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "kernels_of_mine", raising=False)


def test_the_bundled_model_ends_in_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--dtype", "bfloat16", "--quick"]) == 0
    out = capsys.readouterr().out.rstrip().splitlines()
    line = json.loads(out[-1])
    for case in RATES:
        assert line[f"{case}_tokens_per_second"] > 0
        assert line[f"{case}_touched_bytes"] > 0
    assert line["prefill_tokens"] == 512
    assert line["dtype"] == line["limits"]["dtype"] == "bfloat16"
    assert line["limits"]["read_bytes_per_second"] > 1e8
    assert line["limits"]["matmul_flops_per_second"] > 1e8
    assert (line["backend"], line["model"], line["routing"]) == ("cpu", "elastic-mini", "full")
    assert line["level"] == line["machine"]["isa"]
    assert {"elastic_moe", "numpy", "torch", "python"} <= set(line["versions"])
    assert out[0].startswith("limits: memory")  # the ceiling comes first
    assert any("decode, 16 sequences" in words for words in out[1:-1])


def test_bench_writes_no_file_and_warns_of_a_busy_machine(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "count_other_threads", lambda: 9)
    assert main(["bench", str(tiny_folder), "--quick", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["load"]["busy"] is True
    assert "The machine was busy: threads of other programs wanted 9.0 of its" in captured.err
    assert list(tmp_path.iterdir()) == []


def test_json_prints_that_line_alone_and_a_subnetwork_costs_less(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    touched = []
    for routing in ([], ["--routing", "L3-k1-w2"]):
        assert main(["bench", str(tiny_folder), "--quick", "--json", *routing]) == 0
        (line,) = capsys.readouterr().out.splitlines()
        touched.append(json.loads(line)["decode_touched_bytes"])
    assert json.loads(line)["routing"] == "L3-k1-w2"
    assert touched[1] < touched[0]


def test_the_reference_is_timed_when_it_is_named(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(tiny_folder), "--quick", "--backend", "reference"]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (line["backend"], line["level"]) == ("reference", None)
    assert line["decode16_tokens_per_second"] > 0


def test_a_checkpoint_without_a_tokenizer_runs_on_random_ids(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_folder / name, tmp_path / name)
    assert main(["bench", str(tmp_path), "--quick", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ids"] == "random"


def test_nothing_is_timed_if_the_results_are_wrong(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    decode = Batch.decode

    def drift(batch: Batch, ids: list[int]) -> NDArray[np.float32]:
        return decode(batch, ids) * (1.2 if batch.level == native.level() else 1.0)

    monkeypatch.setattr(Batch, "decode", drift)
    assert main(["bench", str(tiny_folder), "--quick", "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "the logits differ from the reference's" in captured.err


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_kernel_of_the_users_own_is_timed_beside_ours(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    common = ["bench", str(tiny_folder), "--dtype", dtype, "--quick"]
    assert main([*common, "--kernel", "kernels_of_mine:experts"]) == 0
    out = capsys.readouterr().out
    line = json.loads(out.splitlines()[-1])
    assert [record["rows"] for record in line["records"]] == [1, 16]
    for record in line["records"]:
        for who in ("yours", "ours", "reference"):
            ends = [record[f"milliseconds{end}"][who] for end in ("_min", "", "_max")]
            assert ends == sorted(ends)
        assert all(record["milliseconds"][who] > 0 for who in ("yours", "ours", "reference"))
        assert record["errors"]["yours"] < 0.01
    assert "yours" in out


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("first_only", "first_only"),
        ("not_a_number", "wrong for 1 rows: the error against float64 is nan"),
        ("nothing", "the result must be (1, 32), got (1, 3)"),
        ("raises", "the kernel raised RuntimeError for 1 rows: not today"),
    ],
)
def test_a_wrong_kernel_is_a_failure_that_tells_the_error(
    tiny_folder: Path,
    capsys: pytest.CaptureFixture[str],
    function: str,
    message: str,
) -> None:
    line = ["bench", str(tiny_folder), "--quick", "--kernel", f"kernels_of_mine:{function}"]
    assert main(line) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    wanted = "wrong for 1 rows" if message == function else message
    assert wanted in captured.err


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", "must be MODULE:FUNCTION"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("kernels_of_mine:missing", "has no function 'missing'"),
    ],
)
def test_a_kernel_that_is_not_there_is_a_bad_argument(
    capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    assert main(["bench", "--kernel", name]) == 2
    assert message in capsys.readouterr().err


def test_a_subnetwork_that_is_not_there_is_a_bad_argument(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(tiny_folder), "--routing", "L99", "--quick"]) == 2
    assert "depth must be" in capsys.readouterr().err
