"""The command line: what it prints, where, and with which status."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from elastic_moe.cli import COMMANDS, main
from elastic_moe.model.checkpoints.checkpoint import load_config
from tests.model.transformers_models import ARCHITECTURES, save_with_tokenizer


def run(*arguments: str) -> int:
    return main(list(arguments))


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_ends_in_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        run(command, "--help")
    assert done.value.code == 0
    out = capsys.readouterr().out
    assert out.rstrip().splitlines()[-1].strip().startswith(("elastic-moe ", "echo "))
    assert "examples:" in out


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--help")
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize("given", [None, "77"])
def test_waiting_threads_sleep_soon_in_every_command(
    given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    if given:
        monkeypatch.setenv("GOMP_SPINCOUNT", given)
    assert main(["info", "--json"]) == 0
    assert os.environ["GOMP_SPINCOUNT"] == (given or "3000")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--prompt", "x", "--routing", "L99"], "depth must be an integer in [1, 48]"),
        (["generate", "--prompt", "x", "--routing", "nonsense"], "is no sub-network name"),
        (["generate", "--prompt", "x", "--temperature", "-1"], "temperature must be"),
        (["info", "--routing", "k9"], "top_k must be an integer in [1, 4], got 9"),
    ],
)
def test_values_that_do_not_fit_are_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["sweep", "--depth", "a,b"], ["info", "--nope"]]
)
def test_a_line_that_cannot_be_parsed_is_a_bad_argument(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as done:
        run(*arguments)
    assert done.value.code == 2


def test_a_missing_checkpoint_is_a_failure_that_lists_what_there_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("info", "no/such/model") == 1
    assert "elastic-mini" in capsys.readouterr().err


def test_info_shows_axes_costs_and_install(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", "--routing", "L24-k2") == 0
    out = capsys.readouterr().out
    for words in ("48", "16", "L24-k2", "24 of 48", "backend reference", "trained at"):
        assert words in out
    assert run("info", "--routing", "L24-k2", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["subnet"]["name"] == "L24-k2"
    assert data["subnet"]["active_layers"] == list(range(24))
    assert 0.2 < data["subnet"]["flops_of_full"] < 0.5
    assert data["model"]["total_params"] == 21_871_744


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_checkpoint_of_every_architecture_is_shown_and_runs(
    architecture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_with_tokenizer(architecture, tmp_path)
    assert run("info", str(tmp_path)) == 0
    shown = capsys.readouterr().out
    config = load_config(tmp_path)
    shared = f"; {config.shared_experts} shared, of {config.shared_hidden} in all"
    assert (shared in shown) is bool(config.shared_experts)
    assert ("; dense are " in shown) is bool(config.dense_layers)
    assert run("info", str(tmp_path), "--json") == 0
    model = json.loads(capsys.readouterr().out)["model"]
    assert model["model_type"] == architecture
    assert model["dense_layers"] == sorted(config.dense_layers)
    assert model["shared_experts"] == config.shared_experts
    assert run("generate", str(tmp_path), "--prompt", "x", "--max-tokens", "2") == 0


def test_generate_streams_and_reports(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [
        "generate",
        str(tiny_folder),
        "--max-tokens",
        "6",
        "--ignore-eos",
        "--routing",
        "L4-k2",
    ]
    assert run(*common, "--prompt", "Hello", "--stats") == 0
    captured = capsys.readouterr()
    assert "L4-k2" in captured.err
    assert "TTFT" in captured.err
    assert "TPOT" in captured.err
    assert run(*common, "--prompt", "Hello", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert captured.out == data["text"] + "\n"
    assert data["routing"]["name"] == "L4-k2"
    assert len(data["token_ids"]) == 6


def test_generate_reads_standard_input_and_chat(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["generate", str(tiny_folder), "--max-tokens", "2", "--ignore-eos", "--json"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello"))
    assert run(*common) == 0
    piped = json.loads(capsys.readouterr().out)
    assert run(*common, "--prompt", "Hello") == 0
    given = json.loads(capsys.readouterr().out)
    assert piped["token_ids"] == given["token_ids"]
    assert run(*common, "--chat", "Hello") == 0
    chat = json.loads(capsys.readouterr().out)
    assert chat["usage"]["prompt_tokens"] > given["usage"]["prompt_tokens"] + 4
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert run(*common) == 2


def test_routing_config_files_take_absent_keys_as_full(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "routing.json"
    common = ["generate", str(tiny_folder), "--prompt", "x", "--max-tokens", "1", "--json"]
    path.write_text('{"activeLayers": [0, 1, 2], "routingTopK": 1}')
    assert run(*common, "--routing-config", str(path)) == 0
    assert json.loads(capsys.readouterr().out)["routing"]["name"] == "L3-k1"
    for bad in ('{"routingTopk": 1}', "[1]", "{"):
        path.write_text(bad)
        assert run(*common, "--routing-config", str(path)) == 2


@pytest.mark.parametrize(
    "text",
    [
        '{"activeLayers": [0, 1, 2], "routingTopK": 1}',
        '{"depth": 3, "top_k": 1, "min_experts": 1}',
        '{"name": "k1-L3", "model": "tiny", "mean_experts": 0.5}',
    ],
)
def test_a_json_file_stands_wherever_a_name_does(
    text: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, other = tmp_path / "routing.json", tmp_path / "routing"
    path.write_text(text)
    other.write_text(text)
    for file in (str(path), str(other)):
        assert run("info", str(tiny_folder), "--routing", file, "--json") == 0
        assert json.loads(capsys.readouterr().out)["subnet"]["name"] == "L3-k1"
    ask = ["generate", str(tiny_folder), "--prompt", "x", "--max-tokens", "1", "--json"]
    assert run(*ask, "--routing", str(path)) == 0
    reported = json.loads(capsys.readouterr().out)["routing"]
    assert reported["name"] == "L3-k1"
    path.write_text(json.dumps(reported))  # an answer, given back
    assert run("extract", str(tiny_folder), str(path), "--out", str(tmp_path / "out")) == 0
    assert capsys.readouterr().out.startswith("L3-k1 of ")


def test_a_json_file_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", "--routing", "no/such.json") == 2
    assert "no/such.json: [Errno 2] No such file" in capsys.readouterr().err


def test_sweep_prints_the_frontier_table(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{n} squared is {n * n}," for n in range(300)))
    common = ["sweep", str(tiny_folder), "--text", str(text), "--tokens", "800", "--quick"]
    out = tmp_path / "out"
    assert run(*common, "--depth", "3,6", "--out", str(out)) == 0
    captured = capsys.readouterr()
    assert "Frontier of tiny on text.txt" in captured.out
    assert "bits/byte" in captured.out
    assert "full" in captured.out
    assert str(out / "report.html") in captured.out.replace("\n", "")
    assert "quality: " in captured.err  # plain lines: this is no terminal
    table = captured.out
    assert run(*common, "--depth", "3,6", "--out", str(out), "--json") == 0
    assert json.loads(capsys.readouterr().out)["complete"] is True
    assert run(*common, "--depth", "3,6", "--out", str(out)) == 0
    again = capsys.readouterr()
    assert again.out == table  # of the stored result
    assert "nothing was measured. --overwrite measures again." in again.err
    assert run(*common, "--depth", "4", "--out", str(out)) == 2
    assert "finished result of another sweep: it lacks L4" in capsys.readouterr().err


@pytest.mark.slow
def test_control_c_keeps_what_is_done_and_says_how_to_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "elastic_moe.cli", "sweep", "--quick", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        # A shell ignores SIGINT in what it runs in the background, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 240
    try:
        while not (tmp_path / "sweep.json").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "the same command goes on from there" in err
    kept = json.loads((tmp_path / "sweep.json").read_text())
    assert kept["complete"] is False
    assert {"full", "L12", "L24", "L36"} <= {point["name"] for point in kept["points"]}
