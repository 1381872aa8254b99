"""The package as users get it: built into a wheel, with a compiler and without one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow  # wheels are built and installed


@dataclass(frozen=True)
class Install:
    """A wheel, and the folder that it was installed into."""

    wheel: Path
    target: Path

    @property
    def files(self) -> list[str]:
        return zipfile.ZipFile(self.wheel).namelist()

    def run(self, code: str) -> str:
        """Run `code` on this install.

        Without `site`, because the .pth file of an editable install would put the working tree
        before this install; third-party packages are added by hand.
        """
        paths = [str(self.target), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        code = f"import sys; sys.path[1:1] = {paths!r}\n" + code
        return _output([sys.executable, "-I", "-S", "-c", code], cwd=self.target)


def _output(command: list[str], cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def _install(folder: Path, **environment: str) -> Install:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index", "--quiet"]
    build = [*pip, "wheel", "--no-build-isolation", *offline, "--wheel-dir", str(folder), str(ROOT)]
    _output(build, ROOT, **environment)
    (wheel,) = folder.glob("*.whl")
    target = folder / "installed"
    _output([*pip, "install", *offline, "--target", str(target), str(wheel)], ROOT)
    return Install(wheel, target)


@pytest.fixture(scope="module")
def with_compiler(tmp_path_factory: pytest.TempPathFactory) -> Install:
    return _install(tmp_path_factory.mktemp("with_compiler"))


@pytest.fixture(scope="module")
def without_compiler(tmp_path_factory: pytest.TempPathFactory) -> Install:
    return _install(tmp_path_factory.mktemp("without_compiler"), CXX="false")


USE = """
import json, warnings
import torch
import elastic_moe_kernels
from elastic_moe_kernels import native, ops
from elastic_moe_kernels.table import build_table
from elastic_moe.routing.subnet import full_layer
sizes = {"num_experts": 4, "max_top_k": 2, "width_granules": 1}
table = build_table([[full_layer(sizes)]], 4, 1).layer(0)
logits, rows = torch.tensor([[0.0, 3.0, 1.0, 2.0]]), torch.zeros(1, dtype=torch.int64)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        ids, weights = ops.route(logits, table, rows, renormalize=True)
    ops.route(logits, table, rows, renormalize=True, implementation="reference")
try:
    ops.require("cpu")
    refusal = ""
except ops.KernelError as error:
    refusal = str(error)
backend = ops.backends()[1]
print(json.dumps({
    "where": elastic_moe_kernels.__file__,
    "ids": ids.tolist(),
    "warnings": [str(w.message) for w in caught],
    "refusal": refusal,
    "available": backend.available,
    "levels": backend.levels,
    "detail": backend.detail,
    "reason": native.build_info().reason,
}))
"""


ENGINE = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from elastic_moe import Engine, SamplingParams
    from elastic_moe_kernels import native, ops
    engines = [Engine.from_pretrained("elastic-mini") for _ in range(2)]
    done = engines[0].generate("Once", "L2", SamplingParams(max_tokens=1))
    reported = [str(w.message) for w in caught]
    Engine.from_pretrained("elastic-mini", backend="reference")
print(json.dumps({
    "backend": engines[0].backend,
    "name": done.routing.name,
    "warnings": reported,
    "in_all": len(caught),
}))
"""


def test_without_a_compiler_an_engine_runs_the_reference_and_warns_once(
    without_compiler: Install,
) -> None:
    seen = json.loads(without_compiler.run(ENGINE))
    assert seen["backend"] == "reference"
    assert seen["name"] == "L2"
    assert seen["in_all"] == len(seen["warnings"]) == 1
    assert "no working C++ compiler" in seen["warnings"][0]
    assert "pip install" in seen["warnings"][0]


def test_with_a_compiler_an_engine_does_not_warn(with_compiler: Install) -> None:
    seen = json.loads(with_compiler.run(ENGINE))
    assert seen["backend"] == "cpu"
    assert seen["in_all"] == len(seen["warnings"]) == 0


def test_without_a_compiler_the_reference_runs_and_says_so(without_compiler: Install) -> None:
    assert not [name for name in without_compiler.files if name.endswith(".so")]
    seen = json.loads(without_compiler.run(USE))
    assert seen["where"].startswith(str(without_compiler.target))
    assert seen["ids"] == [[1, 3]]
    assert len(seen["warnings"]) == 1
    assert "no working C++ compiler" in seen["warnings"][0]
    assert "pip install" in seen["warnings"][0]
    assert seen["refusal"] in seen["warnings"][0]
    assert not seen["available"]
    assert seen["levels"] == []
    assert "no working C++ compiler" in seen["detail"]
    assert "no working C++ compiler" in seen["reason"]


def test_with_a_compiler_the_extension_is_used(with_compiler: Install) -> None:
    assert [
        name
        for name in with_compiler.files
        if re.fullmatch(r"elastic_moe_kernels/_native.*\.so", name)
    ]
    seen = json.loads(with_compiler.run(USE + "\nassert '_native' in str(native.extension())"))
    assert seen["where"].startswith(str(with_compiler.target))
    assert seen["ids"] == [[1, 3]]
    assert seen["warnings"] == []
    assert seen["available"]
    assert seen["levels"][0] == "portable"


def test_wheel_holds_what_it_needs_and_no_more(with_compiler: Install) -> None:
    files = with_compiler.files
    assert "elastic_moe/__init__.py" in files
    assert "elastic_moe_kernels/ops/__init__.py" in files
    assert "elastic_moe_kernels/_build_info.py" in files
    for folder in ("elastic_moe/bundled", "elastic_moe/lab"):
        here = [
            p for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts
        ]
        assert {str(p.relative_to(ROOT)) for p in here} <= set(files)
    foreign = [
        name
        for name in files
        if not name.startswith(("elastic_moe/", "elastic_moe_kernels/", "elastic_moe-"))
        or "gomp" in name
        or name.endswith((".cpp", ".h", ".in", ".pyc"))
    ]
    assert foreign == []
    assert with_compiler.wheel.stat().st_size <= 60e6


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads an ELF file")
def test_extension_needs_no_openmp(with_compiler: Install) -> None:
    (extension,) = (with_compiler.target / "elastic_moe_kernels").glob("_native*.so")
    assert b"GOMP" not in extension.read_bytes()
    assert b"libgomp" not in extension.read_bytes()


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("nanobind", "nanobind was not found"),
        ("Python", "the headers of Python were not found"),
    ],
)
def test_each_missing_part_lowers_the_build_by_one_step(
    tmp_path: Path, missing: str, reason: str
) -> None:
    configure = ["cmake", "-S", str(ROOT / "kernels"), "-B", str(tmp_path), "-G", "Ninja"]
    configure += [f"-DCMAKE_DISABLE_FIND_PACKAGE_{missing}=ON"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}"]
    scripts = sysconfig.get_path("scripts")
    _output(configure, ROOT, PATH=f"{scripts}{os.pathsep}{os.environ['PATH']}")
    info: dict[str, object] = {}
    exec((tmp_path / "_build_info.py").read_text(), info)  # noqa: S102 (what was just configured)
    assert str(info["REASON"]).startswith(reason)
    assert not info["LEVELS"]


def test_transformers_imports_from_the_repository_root() -> None:
    """transformers looks for a package named `kernels`; ours must not be taken for it."""
    code = """
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.utils import is_kernels_available
assert not is_kernels_available()
config = Qwen3MoeConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                        num_key_value_heads=1, num_experts=2, moe_intermediate_size=4, head_dim=8)
AutoModelForCausalLM.from_config(config)
print("fine")
"""
    assert _output([sys.executable, "-c", code], ROOT).endswith("fine")
