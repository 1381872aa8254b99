"""The source obeys the rules of the house, and each rule finds the small tree that breaks it."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.layering_rules import (
    ALLOWED_IN_LIGHT,
    LEVELS,
    RULES,
    WITHOUT_TORCH,
    Rule,
    imports,
    kernels_folder_is_no_package,
    kernels_stand_alone,
    light_model_and_training,
    mirrored_tests,
    modules,
    no_cycles,
    no_torch_below_the_model,
    only_lower_levels,
    run_time_needs_no_reference,
    short_files,
    siblings_import_one_way,
    small_folders,
    sources,
    standard_library_alone_for_testing,
    torch_is_imported_where_it_is_needed,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_source_obeys(rule):
    assert rule(ROOT) == []


def test_the_rules_have_read_this_source():
    """A rule that finds no file finds no fault."""
    assert {"elastic_moe", "elastic_moe.routing", "elastic_moe.engine.core"} <= set(modules(ROOT))
    assert "elastic_moe_kernels.ops" in modules(ROOT)
    seen = {item.target for item in imports(ROOT, "elastic_moe.engine.running.loading")}
    assert {"torch", "elastic_moe_kernels.ops", "elastic_moe.errors"} <= seen
    assert sources(ROOT, "benchmarks")


# --- every rule finds what breaks it

GOOD = {
    "elastic_moe/__init__.py": (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n"
        "    from elastic_moe.engine import Engine as Engine\n"
    ),
    "elastic_moe/errors.py": "",
    "elastic_moe/routing.py": "from elastic_moe.errors import RoutingError\n",
    "elastic_moe/config.py": (
        "import pydantic\n"
        "import typing\n"
        "from elastic_moe import routing\n"
        "if typing.TYPE_CHECKING:\n"
        "    import torch\n"
        "    from elastic_moe.engine import Engine\n"
    ),
    "elastic_moe/model/__init__.py": "",
    "elastic_moe/model/moe.py": (
        "import numpy\nfrom elastic_moe_kernels import ops\n"
        "def render():\n    import jinja2, torch\n"
    ),
    "elastic_moe/engine/__init__.py": "from elastic_moe.engine.engine import Engine\n",
    "elastic_moe/engine/engine.py": "from elastic_moe.config import Config\n",
    "elastic_moe/lab/sweep.py": "from elastic_moe import Engine, __version__\n",
    "elastic_moe/cli/__init__.py": "from . import info\n",
    "elastic_moe/cli/info.py": "from ..lab.sweep import sweep\n",
    "kernels/elastic_moe_kernels/__init__.py": "",
    "kernels/elastic_moe_kernels/ops.py": "import numpy\n",
    "elastic_moe/model/reference/moe.py": (
        "import torch\nfrom elastic_moe.model.moe import render\n"
    ),
    "elastic_moe/model/config.py": "from elastic_moe.model.text.chat import x\n",
    "elastic_moe/model/text/chat.py": "from elastic_moe.model.moe import render\n",
    "elastic_moe/testing/kit.py": "import json\nfrom elastic_moe.errors import EngineError\n",
    "kernels/build/generated.py": "\n" * 500,
    "kernels/csrc/experts.cpp": "// A kernel. It is\n// long because ...\n" + "\n" * 500,
    "tests/model/test_moe.py": "\n" * 500,
    "tests/model/shapes.py": "",
    "tests/kernels/test_ops.py": "",
    "tests/interop/run.py": "",
    **{f"elastic_moe/lab/file{i}.py": "" for i in range(13)},
    "elastic_moe/lab/__init__.py": "",
    "elastic_moe/lab/__pycache__/sweep.pyc": "",
    **{f"benchmarks/results/{i}.jsonl": "" for i in range(20)},
    "benchmarks/bench.py": '"""A table of shapes.\n\nIt is long because ..."""\n' + "\n" * 500,
}
BAD: list[tuple[Rule, str, Mapping[str, str]]] = [
    (
        only_lower_levels,
        "elastic_moe.routing:1 imports elastic_moe.config, which",
        {"elastic_moe/routing.py": "from elastic_moe.config import Config\n"},
    ),
    (
        only_lower_levels,  # written as a name of the package
        "elastic_moe.model.moe:1 imports elastic_moe.engine, which",
        {"elastic_moe/model/moe.py": "from elastic_moe import Engine\n"},
    ),
    (
        only_lower_levels,  # as a module of the package
        "elastic_moe.model.moe:1 imports elastic_moe.engine, which",
        {"elastic_moe/model/moe.py": "from elastic_moe import engine\n"},
    ),
    (
        only_lower_levels,  # relative
        "elastic_moe.model.moe:1 imports elastic_moe.engine.engine, which",
        {"elastic_moe/model/moe.py": "from ..engine.engine import Engine\n"},
    ),
    (
        only_lower_levels,  # inside a function
        "elastic_moe.model.moe:2 imports elastic_moe.engine, which",
        {"elastic_moe/model/moe.py": "def f():\n    import elastic_moe.engine\n"},
    ),
    (
        only_lower_levels,  # the same number, another folder
        "elastic_moe.train.loop:1 imports elastic_moe.engine, which",
        {"elastic_moe/train/loop.py": "from elastic_moe.engine import Engine\n"},
    ),
    (
        only_lower_levels,  # the same number, another file
        "elastic_moe.files:1 imports elastic_moe.errors, which",
        {"elastic_moe/files.py": "from elastic_moe import errors\n"},
    ),
    (
        only_lower_levels,  # for the type checker in one branch, for all in the other
        "elastic_moe.routing:5 imports elastic_moe.config, which",
        {
            "elastic_moe/routing.py": (
                "from typing import TYPE_CHECKING\n"
                "if TYPE_CHECKING:\n"
                "    import torch\n"
                "else:\n"
                "    from elastic_moe.config import Config\n"
            )
        },
    ),
    (only_lower_levels, "'extra' has no level", {"elastic_moe/extra.py": ""}),
    (only_lower_levels, "'addon' has no level", {"elastic_moe/addon/part.py": ""}),
    (
        no_cycles,
        "elastic_moe.lab.a -> elastic_moe.lab.b -> elastic_moe.lab.c -> elastic_moe.lab.a",
        {
            "elastic_moe/lab/a.py": "from elastic_moe.lab.b import x\n",
            "elastic_moe/lab/b.py": "from elastic_moe.lab import c\n",
            "elastic_moe/lab/c.py": "def f():\n    from elastic_moe.lab.a import x\n",
        },
    ),
    (
        no_cycles,
        "elastic_moe.engine -> elastic_moe.engine.engine -> elastic_moe.engine",
        {"elastic_moe/engine/engine.py": "from elastic_moe.engine import Engine\n"},
    ),
    (
        no_cycles,
        "elastic_moe_kernels.ops -> elastic_moe_kernels -> elastic_moe_kernels.ops",
        {
            "kernels/elastic_moe_kernels/__init__.py": "from elastic_moe_kernels import ops\n",
            "kernels/elastic_moe_kernels/ops.py": "import elastic_moe_kernels\n",
        },
    ),
    (
        siblings_import_one_way,
        (
            "elastic_moe.lab.sweeps.sweep:1 imports elastic_moe.lab.view.plot, and "
            "elastic_moe.lab.view.report:2 imports elastic_moe.lab.sweeps.schema"
        ),
        {
            "elastic_moe/lab/sweeps/sweep.py": "from elastic_moe.lab.view.plot import x\n",
            "elastic_moe/lab/sweeps/schema.py": "",
            "elastic_moe/lab/view/plot.py": "",
            "elastic_moe/lab/view/report.py": (
                "def f():\n    from elastic_moe.lab.sweeps.schema import x\n"
            ),
        },
    ),
    (
        siblings_import_one_way,  # by way of a folder in it, and of the folder itself
        (
            "elastic_moe_kernels.ops.cpu.route:1 imports elastic_moe_kernels.step, and "
            "elastic_moe_kernels.step.model:1 imports elastic_moe_kernels.ops.checks"
        ),
        {
            "kernels/elastic_moe_kernels/ops/cpu/route.py": "import elastic_moe_kernels.step\n",
            "kernels/elastic_moe_kernels/ops/checks.py": "",
            "kernels/elastic_moe_kernels/step/__init__.py": "",
            "kernels/elastic_moe_kernels/step/model.py": (
                "from elastic_moe_kernels.ops.checks import x\n"
            ),
        },
    ),
    (
        no_torch_below_the_model,
        "elastic_moe.routing:1 imports torch",
        {"elastic_moe/routing.py": "import torch\n"},
    ),
    (
        no_torch_below_the_model,
        "elastic_moe.config:2 imports torch.nn",
        {"elastic_moe/config.py": "def f():\n    from torch.nn import Module\n"},
    ),
    (
        no_torch_below_the_model,
        "elastic_moe.errors:1 imports elastic_moe_kernels.ops",
        {"elastic_moe/errors.py": "from elastic_moe_kernels import ops\n"},
    ),
    (
        no_torch_below_the_model,
        "elastic_moe:1 imports torch",
        {"elastic_moe/__init__.py": "import torch\n"},
    ),
    (
        torch_is_imported_where_it_is_needed,
        "elastic_moe.model.moe:2 imports torch.nn",
        {"elastic_moe/model/moe.py": "import math\nfrom torch.nn import Module\n"},
    ),
    (
        torch_is_imported_where_it_is_needed,
        "elastic_moe_kernels.ops:1 imports torch",
        {"kernels/elastic_moe_kernels/ops.py": "import torch\n"},
    ),
    (
        light_model_and_training,
        "elastic_moe.model.moe:2 imports jinja2.sandbox",
        {"elastic_moe/model/moe.py": "try:\n    import jinja2.sandbox\nfinally:\n    pass\n"},
    ),
    (
        light_model_and_training,  # whatever its name
        "elastic_moe.model.moe:3 imports rich.progress",
        {"elastic_moe/model/moe.py": "import math\nimport numpy\nimport rich.progress\n"},
    ),
    (
        light_model_and_training,  # by way of another module
        "elastic_moe.train.loop -> elastic_moe.config:1 imports pydantic",
        {"elastic_moe/train/loop.py": "from elastic_moe.config import Config\n"},
    ),
    (
        light_model_and_training,  # by way of its package
        "elastic_moe.model.moe -> elastic_moe.model:1 imports pydantic",
        {
            "elastic_moe/model/__init__.py": "import pydantic\n",
            "elastic_moe/model/moe.py": "from elastic_moe.model.layers import x\n",
            "elastic_moe/model/layers.py": "",
        },
    ),
    (
        kernels_stand_alone,
        "elastic_moe_kernels.ops:2 imports elastic_moe.errors",
        {
            "kernels/elastic_moe_kernels/ops.py": (
                "def f():\n    from elastic_moe.errors import RoutingError\n"
            )
        },
    ),
    (short_files, "elastic_moe/errors.py has 401 lines", {"elastic_moe/errors.py": "\n" * 401}),
    (
        short_files,
        "kernels/elastic_moe_kernels/ops.py has 401 lines",
        {"kernels/elastic_moe_kernels/ops.py": "\n" * 401},
    ),
    (
        short_files,  # a comment is no docstring
        "benchmarks/bench.py has 501 lines",
        {"benchmarks/bench.py": "# long because ...\n" + "\n" * 500},
    ),
    (
        short_files,
        "kernels/csrc/experts.cpp has 402 lines",
        {"kernels/csrc/experts.cpp": "// A kernel.\n\n// long because ...\n" + "\n" * 399},
    ),
    (
        short_files,  # whatever its docstring says
        "benchmarks/bench.py has 703 lines, 700 is the most",
        {"benchmarks/bench.py": '"""It is long because ..."""\n' + "\n" * 702},
    ),
    (
        short_files,
        "experiments/report.py has 401 lines",
        {"experiments/report.py": "\n" * 401},
    ),
    (
        short_files,
        "tests/model/test_moe.py has 701 lines, 700 is the most",
        {"tests/model/test_moe.py": "\n" * 701},
    ),
    (
        small_folders,
        "elastic_moe/lab has 15 entries, 14 are allowed",
        {"elastic_moe/lab/one_more.py": ""},
    ),
    (
        small_folders,  # a folder is an entry, and so is what is no code
        "experiments/runs has 15 entries, 14 are allowed",
        {f"experiments/runs/{i}": "" for i in range(14)} | {"experiments/runs/more/a.h": ""},
    ),
    (
        small_folders,
        "tests/model has 16 entries, 14 are allowed",
        {f"tests/model/test_{i}.py": "" for i in range(14)},
    ),
    (
        mirrored_tests,
        "tests/serving has no folder that it tests",
        {"tests/serving/test_run.py": ""},
    ),
    (
        mirrored_tests,
        "tests/engine/running has no folder that it tests",
        {"tests/engine/running/test_step.py": ""},
    ),
    (
        standard_library_alone_for_testing,
        "elastic_moe.testing.kit:2 imports httpx",
        {"elastic_moe/testing/kit.py": "def f():\n    import httpx\n"},
    ),
    (
        standard_library_alone_for_testing,  # by way of another module
        "elastic_moe.testing.kit -> elastic_moe.config:1 imports pydantic",
        {"elastic_moe/testing/kit.py": "from elastic_moe.config import Config\n"},
    ),
    (
        no_torch_below_the_model,
        "elastic_moe.testing.kit:1 imports torch",
        {"elastic_moe/testing/kit.py": "import torch\n"},
    ),
    (
        run_time_needs_no_reference,
        "elastic_moe.model.moe:2 imports elastic_moe.model.reference.moe",
        {
            "elastic_moe/model/moe.py": (
                "def f():\n    from elastic_moe.model.reference.moe import MoE\n"
            )
        },
    ),
    (
        run_time_needs_no_reference,
        "elastic_moe.model.pack:1 imports elastic_moe.model.reference",
        {
            "elastic_moe/model/pack.py": "from elastic_moe.model import reference\n",
            "elastic_moe/model/reference/__init__.py": "",
        },
    ),
    (kernels_folder_is_no_package, "kernels/__init__.py", {"kernels/__init__.py": ""}),
]


def plant(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_good_tree_passes(rule, tmp_path):
    assert rule(plant(tmp_path, GOOD)) == []


@pytest.mark.parametrize(
    ("rule", "finding", "change"), BAD, ids=[f"{rule.__name__}-{text}" for rule, text, _ in BAD]
)
def test_a_bad_tree_is_found_out(rule, finding, change, tmp_path):
    found = rule(plant(tmp_path, {**GOOD, **change}))
    assert any(finding in one for one in found), found


def test_400_lines_are_allowed_and_700_with_a_reason(tmp_path):
    long = {"elastic_moe/files.py": '"""It is long because ..."""\n' + "\n" * 699}
    assert short_files(plant(tmp_path, {"elastic_moe/errors.py": "\n" * 400, **long})) == []


def test_every_rule_has_a_bad_tree():
    assert {rule for rule, _, _ in BAD} == set(RULES)


# --- what Python itself says


def loaded_by(*names: str) -> set[str]:
    """The modules in memory after importing these in a fresh interpreter."""
    code = f"import sys, {', '.join(names)}; print('\\n'.join(sys.modules))"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_the_package_loads_neither_torch_nor_pydantic():
    loaded = loaded_by("elastic_moe")
    assert "elastic_moe" in loaded
    assert loaded.isdisjoint({"torch", "numpy", "pydantic", "elastic_moe.engine"})


def test_importing_levels_0_to_2_and_the_command_line_loads_no_torch():
    low = [f"elastic_moe.{name}" for name, level in LEVELS.items() if level <= WITHOUT_TORCH]
    there = [name for name in low if name in modules(ROOT)]
    assert {"elastic_moe.errors", "elastic_moe.routing", "elastic_moe.config"} <= set(there)
    loaded = loaded_by(*there, "elastic_moe.cli")
    assert set(there) <= loaded
    assert loaded.isdisjoint({"torch", "elastic_moe_kernels"})


# Runs `python -m elastic_moe.train --help` as a bare checkout would, where nothing else is there.
_BARE = """
import runpy, sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in type(f).__module__]
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ALLOWED:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
sys.meta_path.insert(0, Blocked())
sys.argv = ["train", "--help"]
runpy.run_module("elastic_moe.train", run_name="__main__")
"""
# What torch itself cannot be loaded without.
OF_TORCH = {"typing_extensions", "torchgen"}


def test_training_starts_with_nothing_but_torch_numpy_safetensors_and_tokenizers():
    allowed = sorted(ALLOWED_IN_LIGHT | OF_TORCH)
    done = subprocess.run(
        [sys.executable, "-c", _BARE.replace("ALLOWED", repr(allowed))],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f".{os.pathsep}kernels"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "--stages" in done.stdout


# --- what pyproject.toml promises


def test_a_package_that_says_it_is_typed_carries_the_marker_that_type_checkers_look_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "Typing :: Typed" in project["project"]["classifiers"]
    for package in project["tool"]["scikit-build"]["wheel"]["packages"]:
        assert (ROOT / package / "py.typed").is_file(), package
