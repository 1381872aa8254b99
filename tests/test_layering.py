"""The rules of the house, read from the source: who imports whom, and how long a file may be.

Every rule is a function from a source tree to the places that break it. It must find none here, and
must find the one that a small bad tree has.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A file or folder of elastic_moe imports lower numbers and its own folder, nothing else of it.
LEVELS = {
    "errors": 0,
    "files": 0,
    "routing": 1,
    "config": 2,
    "protocol": 2,
    "model": 3,
    "engine": 4,
    "train": 4,
    "lab": 5,
    "server": 5,
    "testing": 5,
    "pytest_plugin": 6,
    "cli": 6,
}
FREE = {"", "bundled"}  # "" is elastic_moe/__init__.py, whose names load on first use
WITHOUT_TORCH = 2  # the highest level that must import without torch
LIGHT = ("model", "train")  # run from a bare checkout, with these alone:
OUTSIDE_LIGHT = {"torch", "numpy", "safetensors", "tokenizers"}
ALLOWED_IN_LIGHT = sys.stdlib_module_names | OUTSIDE_LIGHT | {"elastic_moe", "elastic_moe_kernels"}
MAX_LINES = 400
REASON = "long because"  # in the docstring of a file that is longer

Rule = Callable[[Path], list[str]]


# --- reading imports


@dataclass(frozen=True)
class Import:
    """One imported module.

    Attributes:
        target: dotted; of `from a import b` it is `a.b` where that is a module of the tree.
        deferred: inside a function, so that loading the importing module does not load it.
        typing_only: under `if TYPE_CHECKING:`.
    """

    target: str
    line: int
    deferred: bool
    typing_only: bool

    @property
    def top(self) -> str:
        return self.target.partition(".")[0]


def sources(root: Path, folder: str) -> list[Path]:
    """Python files below a folder; what hidden folders and builds hold is not source."""
    found = sorted((root / folder).rglob("*.py"))
    return [path for path in found if not _is_built(path.relative_to(root))]


def _is_built(path: Path) -> bool:
    return any(part.startswith(".") or part in {"build", "__pycache__"} for part in path.parts)


def modules(root: Path) -> dict[str, Path]:
    """Dotted name of every module of elastic_moe and of the kernels -> its file."""
    table = {}
    for base, folder in ((root, "elastic_moe"), (root / "kernels", "elastic_moe_kernels")):
        for path in sources(base, folder):
            parts = path.relative_to(base).with_suffix("").parts
            table[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return table


def imports(root: Path, module: str) -> list[Import]:
    """What a module imports, directly."""
    known, found = modules(root), []
    path = known[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    homes = exports(path) if module == "elastic_moe" else exports(known.get("elastic_moe"))
    for node, deferred, typing_only in _statements(_parse(path)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            named = [f"{base}.{alias.name}" for alias in node.names]
            targets = [name if name in known else homes.get(name, base) for name in named]
        found += [Import(target, node.lineno, deferred, typing_only) for target in targets]
    return found


def exports(init: Path | None) -> dict[str, str]:
    """'elastic_moe.Engine' -> 'elastic_moe.engine': names of the package that live in a module."""
    if init is None:
        return {}
    return {
        f"elastic_moe.{alias.asname or alias.name}": node.module
        for node, _, _ in _statements(_parse(init))
        if isinstance(node, ast.ImportFrom) and node.module and not node.level
        for alias in node.names
        if node.module.startswith("elastic_moe.")
    }


@cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _statements(
    node: ast.AST, deferred: bool = False, typing_only: bool = False
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool, bool]]:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        yield node, deferred, typing_only
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        for child in node.body:
            yield from _statements(child, deferred, True)
        for child in node.orelse:
            yield from _statements(child, deferred, typing_only)
        return
    deferred = deferred or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
    for child in ast.iter_child_nodes(node):
        yield from _statements(child, deferred, typing_only)


def part(module: str) -> str:
    """'elastic_moe.engine.sampling' -> 'engine', the file or folder that has a level."""
    return [*module.split("."), ""][1]


def ours(root: Path) -> list[str]:
    return [module for module in modules(root) if module.split(".")[0] == "elastic_moe"]


# --- the rules


def only_lower_levels(root: Path) -> list[str]:
    """Imports that wait until a function runs count, those for the type checker do not."""
    broken = []
    for module in ours(root):
        here = part(module)
        if here not in LEVELS and here not in FREE:
            broken.append(f"{module}: {here!r} has no level")
        for item in imports(root, module):
            there = part(item.target)
            if item.top != "elastic_moe" or item.typing_only or {here, there} & FREE:
                continue
            if here != there and LEVELS.get(there, 99) >= LEVELS.get(here, 99):
                broken.append(f"{module}:{item.line} imports {item.target}, which is not below it")
    return broken


def no_cycles(root: Path) -> list[str]:
    known = modules(root)
    graph = {
        module: sorted(
            {i.target for i in imports(root, module) if i.target in known and not i.typing_only}
        )
        for module in known
    }
    broken: list[str] = []
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            broken.append(" -> ".join([*path[path.index(module) :], module]))
        elif module not in done:
            for target in graph[module]:
                visit(target, [*path, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    return broken


def no_torch_below_the_model(root: Path) -> list[str]:
    """Nor the kernels, which load torch; not even inside a function."""
    return [
        f"{module}:{item.line} imports {item.target}"
        for module in ours(root)
        if not part(module) or LEVELS.get(part(module), 99) <= WITHOUT_TORCH
        for item in imports(root, module)
        if item.top in {"torch", "elastic_moe_kernels"} and not item.typing_only
    ]


def light_model_and_training(root: Path) -> list[str]:
    """Loading `model` or `train` loads nothing but `ALLOWED_IN_LIGHT`, by whatever way.

    What a function imports is its own affair: templates and the hub are for those who have them.
    """
    known, broken = modules(root), []
    for start in (module for module in ours(root) if part(module) in LIGHT):
        reached = {start: start}  # module -> how it was reached
        waiting = [start]
        while waiting:
            module = waiting.pop()
            for item in imports(root, module):
                if item.deferred or item.typing_only:
                    continue
                if item.top not in ALLOWED_IN_LIGHT:
                    broken.append(f"{reached[module]}:{item.line} imports {item.target}")
                parents = item.target.split(".")
                for depth in range(1, len(parents) + 1):  # a package loads before its modules
                    target = ".".join(parents[:depth])
                    if target in known and target not in reached:
                        reached[target] = f"{reached[module]} -> {target}"
                        waiting.append(target)
    return broken


def kernels_stand_alone(root: Path) -> list[str]:
    return [
        f"{module}:{item.line} imports {item.target}"
        for module in modules(root)
        if module.split(".")[0] == "elastic_moe_kernels"
        for item in imports(root, module)
        if item.top == "elastic_moe"
    ]


def short_files(root: Path) -> list[str]:
    broken = []
    for path in (p for f in ("elastic_moe", "kernels", "benchmarks") for p in sources(root, f)):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_LINES and REASON not in (ast.get_docstring(_parse(path)) or ""):
            where = path.relative_to(root)
            broken.append(
                f"{where} has {lines} lines, {MAX_LINES} are allowed. Split it, or say in its "
                f"docstring that it is '{REASON} ...'."
            )
    return broken


def kernels_folder_is_no_package(root: Path) -> list[str]:
    """A package `kernels` would shadow the one that transformers looks up."""
    return [
        str(path.relative_to(root))
        for path in (root / "kernels" / "__init__.py", root / "kernels.py")
        if path.exists()
    ]


RULES: tuple[Rule, ...] = (
    only_lower_levels,
    no_cycles,
    no_torch_below_the_model,
    light_model_and_training,
    kernels_stand_alone,
    short_files,
    kernels_folder_is_no_package,
)


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
        "import torch\nfrom elastic_moe_kernels import ops\ndef render():\n    import jinja2\n"
    ),
    "elastic_moe/engine/__init__.py": "from elastic_moe.engine.engine import Engine\n",
    "elastic_moe/engine/engine.py": "from elastic_moe.config import Config\n",
    "elastic_moe/lab/sweep.py": "from elastic_moe import Engine, __version__\n",
    "elastic_moe/cli/__init__.py": "from . import info\n",
    "elastic_moe/cli/info.py": "from ..lab.sweep import sweep\n",
    "kernels/elastic_moe_kernels/__init__.py": "",
    "kernels/elastic_moe_kernels/ops.py": "import torch\n",
    "kernels/build/generated.py": "\n" * 500,
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


def test_400_lines_are_allowed(tmp_path):
    assert short_files(plant(tmp_path, {"elastic_moe/errors.py": "\n" * 400})) == []


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
