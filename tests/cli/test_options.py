"""Every option reaches what it is for, and what goes wrong is one line and a status."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from elastic_moe_kernels.errors import KernelError

from elastic_moe.cli import main
from elastic_moe.cli.sweep import show
from elastic_moe.engine import Engine
from elastic_moe.lab import sweep as lab_sweep  # the function; the module is in sys.modules
from elastic_moe.routing.axes import TRAINED

SWEEP_MODULE = sys.modules[lab_sweep.__module__]


class Reached(Exception):  # noqa: N818  (not an error: it ends a command where it is watched)
    """Carries what a command passed on."""

    def __init__(self, *args: object, **kwargs: Any) -> None:
        self.passed, self.kwargs = args, kwargs


def reach(*args: object, **kwargs: object) -> None:
    raise Reached(*args, **kwargs)


@pytest.mark.parametrize(
    ("option", "value", "name", "expected"),
    [
        ("--depth", "2,6", "depth", [2, 6]),
        ("--top-k", "1,3", "top_k", [1, 3]),
        ("--expert-width", "2", "expert_width", [2]),
        ("--sparsity", "0,0.5", "sparsity_threshold", [0.0, 0.5]),
        ("--expert-pool", "4", "expert_pool", [4]),
        ("--tokens", "600", "tokens", 600),
        ("--text", "notes.txt", "text", Path("notes.txt")),
        ("--rank-channels", "more.txt", "rank_channels", Path("more.txt")),
        ("--quick", None, "quick", True),
        ("--overwrite", None, "overwrite", True),
    ],
)
def test_every_option_of_sweep_reaches_the_sweep(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    value: str | None,
    name: str,
    expected: object,
) -> None:
    monkeypatch.setattr(Engine, "from_pretrained", lambda *_, **__: "engine")
    monkeypatch.setattr(SWEEP_MODULE, "sweep", reach)
    out = ["--out", str(tmp_path)]
    with pytest.raises(Reached) as reached:
        main(["sweep", *out, option, *([] if value is None else [value])])
    assert reached.value.passed == ("engine",)
    assert reached.value.kwargs[name] == expected
    assert reached.value.kwargs["out"] == tmp_path
    with pytest.raises(Reached) as without:
        main(["sweep", *out])
    assert without.value.kwargs[name] in (None, False)


@pytest.mark.parametrize("command", [["sweep"], ["generate", "--prompt", "x"]])
@pytest.mark.parametrize(
    ("option", "value", "name"),
    [
        ("--dtype", "float32", "dtype"),
        ("--backend", "reference", "backend"),
        ("--device", "cuda", "device"),
        ("--download", None, "download"),
    ],
)
def test_every_option_of_the_model_reaches_the_engine(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
    option: str,
    value: str | None,
    name: str,
) -> None:
    monkeypatch.setattr(Engine, "from_pretrained", reach)
    out = ["--out", str(tmp_path)] if command == ["sweep"] else []
    with pytest.raises(Reached) as reached:
        main([*command, *out, option, *([] if value is None else [value])])
    assert reached.value.kwargs[name] == (True if value is None else value)


@pytest.mark.parametrize(
    ("option", "value", "name", "expected"),
    [
        ("--max-tokens", "7", "max_tokens", 7),
        ("--temperature", "0.7", "temperature", 0.7),
        ("--top-p", "0.5", "top_p", 0.5),
        ("--sampling-top-k", "3", "top_k", 3),
        ("--min-p", "0.1", "min_p", 0.1),
        ("--repetition-penalty", "1.5", "repetition_penalty", 1.5),
        ("--seed", "9", "seed", 9),
        ("--stop", "end", "stop", ("end",)),
        ("--ignore-eos", None, "ignore_eos", True),
    ],
)
def test_every_option_of_sampling_reaches_the_engine(
    tiny: Engine,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    value: str | None,
    name: str,
    expected: object,
) -> None:
    monkeypatch.setattr(Engine, "from_pretrained", lambda *_, **__: tiny)
    monkeypatch.setattr(Engine, "stream", reach)
    with pytest.raises(Reached) as reached:
        main(["generate", "--prompt", "x", option, *([] if value is None else [value])])
    sampling = reached.value.passed[3] if len(reached.value.passed) > 3 else None
    sampling = sampling or reached.value.passed[-1]
    assert getattr(sampling, name) == expected


def test_generate_writes_json_that_a_schema_file_allows(
    tiny: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Engine, "from_pretrained", lambda *_, **__: tiny)
    schema = tmp_path / "schema.json"
    command = ["generate", "--prompt", "x", "--json-schema", str(schema)]
    assert main(command) == 2
    assert "schema.json cannot be read" in capsys.readouterr().err
    schema.write_text('{"enum": ["cat", "dog"]}')
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out) in ("cat", "dog")


@pytest.mark.parametrize(
    "arguments",
    [
        ["sweep", "--tokens", "-5"],
        ["sweep", "--tokens", "0"],
        ["sweep", "--tokens", "1.5"],
        ["info", "--context", "-5"],
    ],
)
def test_a_count_below_one_is_a_bad_argument_that_is_named(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 2
    wanted = f"argument {arguments[1]}: must be an integer of at least 1, got '{arguments[2]}'"
    assert wanted in capsys.readouterr().err


def test_out_is_tried_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["sweep", "no/such/model", "--out", str(tmp_path / "file")]) == 1
    assert "the results cannot be written there: File exists. Name a" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "a/b: No space left on device."),
        (OSError("odd"), "odd."),
        (KernelError("no such level"), "no such level"),
    ],
)
def test_what_the_system_or_a_kernel_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    line: str,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Engine, "from_pretrained", refuse)
    assert main(["generate", "--prompt", "x"]) == 1
    assert capsys.readouterr().err == f"elastic-moe generate: {line}\n"


def test_a_defect_is_no_failure_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(Engine, "from_pretrained", refuse)
    with pytest.raises(ValueError, match="a bug"):
        main(["generate", "--prompt", "x"])


def test_text_that_is_no_utf8_and_a_device_that_is_none_are_told_apart(
    tiny: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--prompt", "x", "--device", "foo"]) == 1
    assert "device must be 'cpu', 'cuda'" in capsys.readouterr().err
    monkeypatch.setattr(Engine, "from_pretrained", lambda *_, **__: tiny)
    assert main(["generate", "--prompt", "a\udcff"]) == 2
    assert "lone surrogate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "values"),
    [
        (option, values)
        for axis in TRAINED
        for option in axis.option()
        for values in (["1,99", "0,-1"] if axis.kind != "real" else ["0.5,2", "-0.5"])
    ],
)
def test_a_value_that_no_subnetwork_has_is_refused_before_anything_is_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
    values: str,
) -> None:
    monkeypatch.setattr(Engine, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert main(["sweep", f"{option}={values}", "--out", str(tmp_path / "out")]) == 2
    assert " must be " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_info_tells_why_a_level_cannot_be_had() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "elastic_moe.cli", "info"],
        env={**os.environ, "ELASTIC_MOE_ISA": "bogus"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "no: ELASTIC_MOE_ISA must be one of portable" in done.stdout


def test_names_are_printed_as_they_are_not_as_markup(
    capsys: pytest.CaptureFixture[str], tiny_folder: Path, tmp_path: Path
) -> None:
    root = Path(__file__).resolve().parents[2]
    path = root / "benchmarks" / "results" / "sweep-elastic-mini.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    result["corpus"]["name"] = "notes[draft].txt"
    result["model"]["name"] = "a:smile:[b]"
    result["skipped"] = [{"name": "L9[/]", "reason": "[red]no"}]
    show(result, Path("ja[/x]"))
    out = capsys.readouterr().out
    for words in ("notes[draft].txt", "a:smile:[b]", "L9[/]: [red]no", "ja[/x]/report.html"):
        assert words in out
    odd = tmp_path / "tiny[bold]"
    odd.symlink_to(tiny_folder)
    assert main(["info", str(odd)]) == 0
    assert "model " in capsys.readouterr().out
