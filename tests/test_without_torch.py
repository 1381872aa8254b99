"""What the CPU runs needs no torch: none is loaded where it is there, and none is missed elsewhere.

`make test-without-torch` runs this file and others in an install that has none.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from elastic_moe_kernels import native
from elastic_moe_kernels.arrays import has_torch

from elastic_moe.testing import start_server

RUN = """
import sys
{before}
from elastic_moe.cli import main
status = main(sys.argv[1:])
print("loads torch" if sys.modules.get("torch") else "loads no torch", file=sys.stderr)
sys.exit(status)
"""
NO_TORCH = 'sys.modules["torch"] = None'  # as if it were not installed
NO_KERNELS = """
from elastic_moe_kernels import native
native.build_info = lambda: native.BuildInfo("", (), "no working C++ compiler was found")
"""
TEXT = " ".join(f"{n} squared is {n * n}," for n in range(400))
COMMANDS = {
    "generate": ["generate", "{model}", "--prompt", "The", "--max-tokens", "3"],
    "bench": ["bench", "{model}", "--quick", "--json"],
    "info": ["info", "{model}", "--routing", "L2"],
    "extract": ["extract", "{model}", "L2-w2", "--out", "{out}"],
    "sweep": ["sweep", "{model}", "--quick", "--text", "{text}", "--depth", "3", "--out", "{out}"],
}
needs_kernels = pytest.mark.skipif(bool(native.missing()), reason="no C++ kernels are installed")


def run(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN.format(before=before), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@needs_kernels
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_on_the_cpu_loads_no_torch(
    command: str, tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    places = {"model": tiny_folder, "out": tmp_path / "out", "text": tmp_path / "text.txt"}
    done = run(*(word.format(**places) for word in COMMANDS[command]))
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("loads no torch\n")


@needs_kernels
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_server_maps_no_torch_and_stays_small() -> None:
    with start_server("elastic-mini") as server:
        body = json.dumps({"model": "elastic-mini", "prompt": "Once", "max_tokens": 4}).encode()
        headers = {
            "Authorization": f"Bearer {server.api_key}",
            "Content-Type": "application/json",
        }
        request = urllib.request.Request(f"{server.url}/v1/completions", body, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["choices"][0]["text"]
        assert "/torch/" not in Path(f"/proc/{server.pid}/maps").read_text()
        status = Path(f"/proc/{server.pid}/status").read_text()
    (resident,) = (line for line in status.splitlines() if line.startswith("VmRSS"))
    assert int(resident.split()[1]) < 250_000  # kB


@needs_kernels
def test_a_sub_network_that_was_extracted_without_torch_is_that_of_the_whole(
    tiny_folder: Path, tmp_path: Path
) -> None:
    prompt = ["--prompt", "The yield expression", "--max-tokens", "12", "--json"]
    assert run("extract", str(tiny_folder), "L2-w2", "--out", str(tmp_path / "cut")).returncode == 0
    cut = run("generate", str(tmp_path / "cut"), *prompt)
    whole = run("generate", str(tiny_folder), *prompt, "--routing", "L2-w2")
    assert json.loads(cut.stdout)["token_ids"] == json.loads(whole.stdout)["token_ids"]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["generate", "{model}", "--prompt", "x", "--backend", "reference"], "backend 'reference'"),
        (["generate", "{model}", "--prompt", "x", "--device", "cuda"], "device 'cuda'"),
        (["train", "--out", "{out}"], "training"),
        (["bench", "{model}", "--kernel", "mine:experts"], "--kernel"),
        (
            ["extract", "{model}", "w2", "--rank-channels", "{text}", "--out", "{out}"],
            "ranking channels",
        ),
    ],
    ids=["reference", "cuda", "train", "kernel", "rank-channels"],
)
def test_what_needs_torch_says_so_in_a_line(
    arguments: list[str], what: str, tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    places = {"model": tiny_folder, "out": tmp_path / "out", "text": tmp_path / "text.txt"}
    done = run(*(word.format(**places) for word in arguments), before=NO_TORCH)
    assert done.returncode == 1
    said = f"{what} needs torch, which is not installed. Install it: pip install 'elastic-moe[tor"
    assert said in done.stderr
    assert len([line for line in done.stderr.splitlines() if "torch" in line]) == 2


@pytest.mark.parametrize("command", ["generate", "bench", "sweep"])
def test_without_compiler_and_torch_both_remedies_are_named(
    command: str, tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    places = {"model": tiny_folder, "out": tmp_path / "out", "text": tmp_path / "text.txt"}
    arguments = [word.format(**places) for word in COMMANDS[command]]
    done = run(*arguments, before=NO_TORCH + NO_KERNELS)
    assert done.returncode == 1
    assert "no working C++ compiler was found" in done.stderr
    assert "apt-get install g++" in done.stderr
    assert "pip install 'elastic-moe[torch]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_install_without_torch_is_known_as_one() -> None:
    done = run("info", "--json", before="" if not has_torch() else NO_TORCH)
    reference = json.loads(done.stdout)["backends"][0]
    assert not reference["available"]
    assert "elastic-moe[torch]" in reference["detail"]
