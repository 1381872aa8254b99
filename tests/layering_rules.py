"""The rules of the house, read from the source: imports, the size of files and of folders.

Every rule is a function from the root of a source tree to the places that break it.
"""

from __future__ import annotations

import ast
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# A file or folder of elastic_moe imports lower numbers and its own folder, nothing else of it.
LEVELS = {
    "errors": 0,
    "files": 0,
    "sizes": 0,
    "routing": 1,
    "config": 2,
    "protocol": 3,
    "dialects": 3,
    "client": 4,
    "model": 4,
    "engine": 5,
    "train": 5,
    "lab": 6,
    "server": 6,
    "gateway": 6,
    "testing": 7,
    "pytest_plugin": 8,
    "cli": 8,
}
FREE = {"", "bundled"}  # "" is elastic_moe/__init__.py, whose names load on first use
WITHOUT_TORCH = 3  # the highest level that must import without torch
ALSO_WITHOUT_TORCH = {"client", "testing"}
# Modules that import torch, and folders of such.
WITH_TORCH = (
    "elastic_moe.engine.running.reference.",
    "elastic_moe.lab.bench.kernels.",
    "elastic_moe.lab.bench.layer.",
    "elastic_moe.model.reference.",
    "elastic_moe.train.",
    "elastic_moe_kernels.reference.",
    "elastic_moe_kernels.training.",
)
LIGHT = ("model", "train")  # run from a bare checkout, with these alone:
OUTSIDE_LIGHT = {"torch", "numpy", "safetensors", "tokenizers"}
ALLOWED_IN_LIGHT = sys.stdlib_module_names | OUTSIDE_LIGHT | {"elastic_moe", "elastic_moe_kernels"}
MAX_LINES = 400
REASON = "long because"  # in the docstring of a file that is longer
MOST_LINES = 700  # of any file
MAX_ENTRIES = 14  # of a folder, without what marks it as a package
REFERENCE = "elastic_moe.model.reference"
CODE = ("elastic_moe", "kernels", "benchmarks", "experiments")
UNCOUNTED = {"__init__.py", "py.typed"}
LARGE_FOLDERS = {
    "elastic_moe": "the parts that have a level",
    "tests": "one entry for each of those parts",
    "benchmarks/results": "data",
}

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


@cache
def modules(root: Path) -> dict[str, Path]:
    """Dotted name of every module of elastic_moe and of the kernels -> its file."""
    table = {}
    for base, folder in ((root, "elastic_moe"), (root / "kernels", "elastic_moe_kernels")):
        for path in sources(base, folder):
            parts = path.relative_to(base).with_suffix("").parts
            table[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return table


@cache
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


def siblings_import_one_way(root: Path) -> list[str]:
    """Of two folders of one folder, only one imports from the other.

    A folder and the files beside it may import from one another, as long as no modules do.
    """
    known = modules(root)
    found: dict[tuple[str, str], str] = {}  # (importing folder, imported one) -> one import
    for module in known:
        for item in imports(root, module):
            pair = _sibling_folders(known, module, item.target)
            if pair is not None and not item.typing_only:
                found.setdefault(pair, f"{module}:{item.line} imports {item.target}")
    return [
        f"{where}, and {found[b, a]}"
        for (a, b), where in found.items()
        if a < b and (b, a) in found
    ]


def _sibling_folders(known: dict[str, Path], *pair: str) -> tuple[str, str] | None:
    """The folders in which two modules part, if they do so in folders."""
    a, b = (module.split(".") for module in pair)
    depth = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    if not depth or any(module not in known for module in pair):
        return None
    for parts in (a, b):
        if len(parts) == depth + 1 and known[".".join(parts)].name != "__init__.py":
            return None
    return ".".join(a[: depth + 1]), ".".join(b[: depth + 1])


def no_torch_below_the_model(root: Path) -> list[str]:
    """Nor the kernels; not even inside a function."""
    return [
        f"{module}:{item.line} imports {item.target}"
        for module in ours(root)
        if not part(module)
        or LEVELS.get(part(module), 99) <= WITHOUT_TORCH
        or part(module) in ALSO_WITHOUT_TORCH
        for item in imports(root, module)
        if item.top in {"torch", "elastic_moe_kernels"} and not item.typing_only
    ]


def torch_is_imported_where_it_is_needed(root: Path) -> list[str]:
    """Loading another module loads no torch; a function may import it."""
    return [
        f"{module}:{item.line} imports {item.target}"
        for module in modules(root)
        if not f"{module}.".startswith(WITH_TORCH)
        for item in imports(root, module)
        if item.top == "torch" and not item.typing_only and not item.deferred
    ]


def light_model_and_training(root: Path) -> list[str]:
    """Loading `model` or `train` loads nothing but `ALLOWED_IN_LIGHT`, by whatever way.

    What a function imports is its own affair: templates and the hub are for those who have them.
    """
    return _loads_others(root, LIGHT, ALLOWED_IN_LIGHT)


def standard_library_alone_for_testing(root: Path) -> list[str]:
    """The testing kit runs beside an application that has nothing of ours installed but this."""
    allowed = sys.stdlib_module_names | {"elastic_moe"}
    return _loads_others(root, ("testing",), allowed, deferred_too=True)


def _loads_others(
    root: Path,
    parts: tuple[str, ...],
    allowed: frozenset[str] | set[str],
    *,
    deferred_too: bool = False,
) -> list[str]:
    """Imports of modules that are not allowed, in all that loading these parts loads."""
    known, broken = modules(root), []
    for start in (module for module in ours(root) if part(module) in parts):
        reached = {start: start}  # module -> how it was reached
        waiting = [start]
        while waiting:
            module = waiting.pop()
            for item in imports(root, module):
                if (item.deferred and not deferred_too) or item.typing_only:
                    continue
                if item.top not in allowed:
                    broken.append(f"{reached[module]}:{item.line} imports {item.target}")
                parents = item.target.split(".")
                for depth in range(1, len(parents) + 1):  # a package loads before its modules
                    target = ".".join(parents[:depth])
                    if target in known and target not in reached:
                        reached[target] = f"{reached[module]} -> {target}"
                        waiting.append(target)
    return broken


def run_time_needs_no_reference(root: Path) -> list[str]:
    """What the CPU run time loads of the model stands apart from its PyTorch reference."""
    return [
        f"{module}:{item.line} imports {item.target}"
        for module in ours(root)
        if part(module) == "model" and not f"{module}.".startswith(f"{REFERENCE}.")
        for item in imports(root, module)
        if f"{item.target}.".startswith(f"{REFERENCE}.") and not item.typing_only
    ]


def kernels_stand_alone(root: Path) -> list[str]:
    return [
        f"{module}:{item.line} imports {item.target}"
        for module in modules(root)
        if module.split(".")[0] == "elastic_moe_kernels"
        for item in imports(root, module)
        if item.top == "elastic_moe"
    ]


def short_files(root: Path) -> list[str]:
    """One concept is one file; a long one says why, and none is longer than `MOST_LINES`."""
    broken = []
    for path in (p for folder in (*CODE, "tests") for p in _texts(root, folder)):
        where, lines = path.relative_to(root), len(path.read_text("utf-8").splitlines())
        if lines > MOST_LINES:
            broken.append(f"{where} has {lines} lines, {MOST_LINES} is the most. Split it.")
        elif lines > MAX_LINES and where.parts[0] in CODE and REASON not in _opening(path):
            broken.append(
                f"{where} has {lines} lines, {MAX_LINES} are allowed. Split it, or say in its "
                f"docstring that it is '{REASON} ...'."
            )
    return broken


def _texts(root: Path, folder: str) -> list[Path]:
    """Python and C++ below a folder."""
    found = [path for end in ("py", "cpp", "h") for path in (root / folder).rglob(f"*.{end}")]
    return sorted(path for path in found if not _is_built(path.relative_to(root)))


def _opening(path: Path) -> str:
    """The docstring of a module, or the comment that a C++ file opens with."""
    if path.suffix == ".py":
        return ast.get_docstring(_parse(path)) or ""
    lines = path.read_text("utf-8").splitlines()
    return " ".join(itertools.takewhile(lambda line: line.startswith("//"), lines))


def small_folders(root: Path) -> list[str]:
    """A folder holds about a dozen entries; what marks it as a package is not counted."""
    broken = []
    for folder in (f for top in (*CODE, "tests") for f in _folders(root / top)):
        where = folder.relative_to(root)
        entries = [
            p for p in folder.iterdir() if p.name not in UNCOUNTED and not _is_built(Path(p.name))
        ]
        if str(where) not in LARGE_FOLDERS and not _is_built(where) and len(entries) > MAX_ENTRIES:
            broken.append(f"{where} has {len(entries)} entries, {MAX_ENTRIES} are allowed")
    return broken


def _folders(top: Path) -> list[Path]:
    return [top, *sorted(p for p in top.rglob("*") if p.is_dir())] if top.is_dir() else []


def mirrored_tests(root: Path) -> list[str]:
    """`tests/a/b` holds the tests of `elastic_moe/a/b`, or of `a/b` beside the package.

    `tests/kernels/b` holds those of `b` in the kernels' package.
    """
    broken = []
    for folder in _folders(root / "tests")[1:]:
        where = folder.relative_to(root / "tests")
        holds_tests = any(folder.glob("test_*.py")) and not _is_built(where)
        tested = [root / base / where for base in ("elastic_moe", ".")]
        if where.parts[0] == "kernels":
            tested.append(root / "kernels/elastic_moe_kernels" / where.relative_to("kernels"))
        if holds_tests and not any(path.is_dir() for path in tested):
            broken.append(f"tests/{where} has no folder that it tests")
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
    siblings_import_one_way,
    no_torch_below_the_model,
    torch_is_imported_where_it_is_needed,
    light_model_and_training,
    standard_library_alone_for_testing,
    run_time_needs_no_reference,
    kernels_stand_alone,
    short_files,
    small_folders,
    mirrored_tests,
    kernels_folder_is_no_package,
)
