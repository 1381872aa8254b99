"""Every path, command, option, target and module that the documentation names exists.

Each check is a function from a page to the places that are wrong. It must find none in the
documentation, and must find the one that a small bad page has.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import re
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path

import pytest

from elastic_moe.cli import COMMANDS
from elastic_moe.pytest_plugin import OPTIONS as PLUGIN
from tests.docs.pages import ROOT, Page, pages

Check = Callable[[Page], list[str]]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SPAN = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"\.{0,2}[\w\-.{},*]*(?:/[\w\-.{},*]+)*/?")
SUFFIXES = {".py", ".h", ".cpp", ".md", ".toml", ".jsonl", ".yml", ".yaml", ".txt", ".in", ".j2"}
# Written by a command, or of the reader; not of this repository.
ELSEWHERE = {"keys.txt", "notes.txt"}
NOT_PATHS = {"and/or"}
OTHER_OPTIONS = {"--index-url", "--help", "--version", "--cov"}  # of pip and of every command


# --- what a page names


def spans(page: Page) -> list[str]:
    """Inline code."""
    return SPAN.findall(page.prose)


def commands(page: Page) -> list[list[str]]:
    """Commands as words: of code blocks, and of inline code that begins with a program."""
    lines = [line for block in page.blocks for line in block.commands]
    lines += [
        s for s in spans(page) if re.match(r"(elastic-moe|make|python3?|\S*/python|git) \S", s)
    ]
    found = []
    for line in lines:
        for part in re.split(r"\s(?:&&|\|\||\||;)\s", line):
            try:
                words = shlex.split(part, comments=True)
            except ValueError:  # a part of a shell script that continues in the next line
                continue
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # VARIABLE=value
                words = words[1:]
            if words:
                found.append(words)
    return found


def heading_anchors(text: str) -> set[str]:
    """Anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", h.replace("`", "")).strip().lower() for h in headings)
    return {heading.replace(" ", "-") for heading in plain}


def expand(text: str) -> Iterator[str]:
    """`a/{b,c}.py` is `a/b.py` and `a/c.py`."""
    parts = re.split(r"\{([^}]*)\}", text)
    choices = [part.split(",") if odd % 2 else [part] for odd, part in enumerate(parts)]
    return ("".join(chosen) for chosen in product(*choices))


@cache
def top_level(root: Path = ROOT) -> frozenset[str]:
    """Files and folders of the repository; what commands write there is in .gitignore."""
    lines = (root / ".gitignore").read_text(encoding="utf-8").split()
    written = {line.strip("/") for line in lines}
    there = {path.name for path in root.iterdir() if not path.name.startswith(".")}
    return frozenset(there - written) | {".ci", ".github"}


def as_path(word: str) -> str | None:
    """A word as a path of the repository, without `::name`; None where it is no such path."""
    path = word.split("::")[0].rstrip("/")
    if not path or not PATH.fullmatch(path) or path in ELSEWHERE or path in NOT_PATHS:
        return None
    if re.search(r"(?<![A-Za-z])NAME(?![A-Za-z])", path):  # a placeholder
        return None
    first = path.split("/")[0]
    if first in top_level() and ("/" in word or "." in path):
        return path
    return path if Path(path).suffix in SUFFIXES and "*" not in path else None


def found_at(path: str, page: Page) -> bool:
    """From the root, or from the page's folder."""
    for base in (ROOT, (ROOT / page.name).parent):
        if "*" in path:
            if any(base.glob(path)):
                return True
        elif (base / path).exists():
            return True
    return False


# --- the checks


def links(page: Page) -> list[str]:
    """Links lead to files, and their anchors to headings."""
    broken = []
    for target in LINK.findall(page.prose):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = (ROOT / page.name).parent / name if name else ROOT / page.name
        if not file.exists():
            broken.append(f"{page.name}: link to {target}, which does not exist")
        elif anchor:
            text = file.read_text(encoding="utf-8") if name else page.text
            if anchor not in heading_anchors(text):
                broken.append(f"{page.name}: link to {target}, which has no such heading")
    return broken


def paths(page: Page) -> list[str]:
    """Paths in inline code and in commands exist."""
    words = [word for span in spans(page) for word in span.split()]
    words += [word for command in commands(page) for word in command[1:]]
    return [
        f"{page.name}: {path} does not exist"
        for word in words
        if (whole := as_path(word.strip("(),;:")))
        for path in expand(whole)
        if not found_at(path, page)
    ]


def names_in_files(page: Page) -> list[str]:
    """`file::name` and `file::Class.name`: the file defines it."""
    broken = []
    for span in spans(page):
        file, _, name = span.partition("::")
        if not name or as_path(file) is None or not (ROOT / file).is_file():
            continue
        if name not in defined(ROOT / file):
            broken.append(f"{page.name}: {file} defines no {name}")
    return broken


@cache
def defined(file: Path) -> frozenset[str]:
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py":  # C++: any function, type or constant that the file speaks of
        return frozenset(re.findall(r"\b[A-Za-z_]\w*", text))
    names: set[str] = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.add(prefix + node.name)
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names.update(prefix + t.id for t in targets if isinstance(t, ast.Name))

    visit(ast.parse(text).body, "")
    return frozenset(names)


@cache
def parser(command: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=command)
    importlib.import_module(f"elastic_moe.cli.{command}").add_arguments(made)
    return made


@cache
def options(command: str) -> frozenset[str]:
    return frozenset(o for action in parser(command)._actions for o in action.option_strings)


def elastic_moe_commands(page: Page) -> list[str]:
    """`elastic-moe X --option`: the subcommand and its options exist."""
    broken = []
    for words in commands(page):
        if words[0] != "elastic-moe":
            continue
        rest = [word for word in words[1:] if word not in {"--version", "--help"}]
        if not rest:
            continue
        if rest[0] not in COMMANDS:
            if rest[0].isupper() or "|" in rest[0]:  # a placeholder
                continue
            broken.append(f"{page.name}: elastic-moe has no command {rest[0]}")
            continue
        given = [word.split("=")[0] for word in rest[1:] if re.match(r"--[a-z]", word)]
        broken += [
            f"{page.name}: elastic-moe {rest[0]} has no option {option}"
            for option in given
            if option not in options(rest[0])
        ]
    return broken


def options_alone(page: Page) -> list[str]:
    """`--option` in inline code: some command or the pytest plugin has it."""
    known = {option for command in COMMANDS for option in options(command)} | OTHER_OPTIONS
    known |= {f"--elastic-moe-{name}" for name in PLUGIN}
    return [
        f"{page.name}: no command has the option {option}"
        for span in spans(page)
        if span.startswith("--")
        for option in re.findall(r"--[a-z][a-z\-]*[a-z]", span)
        if option not in known
    ]


def make_targets(page: Page) -> list[str]:
    """`make target` is in the Makefile."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z\-]*):", text, flags=re.MULTILINE))
    return [
        f"{page.name}: the Makefile has no target {words[1]}"
        for words in commands(page)
        if words[0] == "make" and len(words) > 1 and "=" not in words[1]
        if words[1] not in targets
    ]


def python_modules(page: Page) -> list[str]:
    """`python -m module`: it is one of ours or installed."""
    broken = []
    for words in commands(page):
        if re.fullmatch(r"(.*/)?python3?", words[0]) and "-m" in words[1:-1]:
            module = words[words.index("-m") + 1]
            if module.split(".")[0] in top_level():
                file = ROOT.joinpath(*module.split("."))
                there = file.with_suffix(".py").exists() or (file / "__main__.py").exists()
            else:
                there = importlib.util.find_spec(module.split(".")[0]) is not None
            if not there:
                broken.append(f"{page.name}: there is no module {module}")
    return broken


def dotted_names(page: Page) -> list[str]:
    """`elastic_moe.a.b` and `elastic_moe_kernels.a.b`: a module, or a name of one."""
    broken = []
    for span in spans(page):
        for name in re.findall(r"\b(?:elastic_moe|elastic_moe_kernels)(?:\.\w+)+", span):
            module, rest = name, ""
            while module and not _is_module(module):
                module, _, last = module.rpartition(".")
                rest = f"{last}.{rest}" if rest else last
            target: object = importlib.import_module(module)
            for part in rest.split(".") if rest else []:
                if not hasattr(target, part):
                    broken.append(f"{page.name}: {module} has no {rest}")
                    break
                target = getattr(target, part)
    return broken


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


CHECKS: tuple[Check, ...] = (
    links,
    paths,
    names_in_files,
    elastic_moe_commands,
    options_alone,
    make_targets,
    python_modules,
    dotted_names,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_documentation_obeys(check: Check) -> None:
    findings = [finding for page in pages() for finding in check(page)]
    assert not findings, "\n".join(findings)


# --- every check finds what it is for

BAD: list[tuple[Check, str, str]] = [
    (links, "docs/nowhere.md", "[a page](docs/nowhere.md)"),
    (links, "no such heading", "[a heading](README.md#nothing-like-it)"),
    (links, "no such heading", "# Here\n[below](#there)"),
    (paths, "elastic_moe/engine/nowhere.py", "It is in `elastic_moe/engine/nowhere.py`."),
    (paths, "elastic_moe/nowhere", "The folder `elastic_moe/nowhere/`."),
    (paths, "elastic_moe/nowhere.py", "In `elastic_moe/{errors,nowhere}.py`."),
    (paths, "nowhere.py", "In `nowhere.py`."),
    (paths, "tests/nowhere", "```sh\npython -m pytest tests/nowhere\n```"),
    (names_in_files, "defines no Nobody", "By `elastic_moe/errors.py::Nobody`."),
    (
        names_in_files,
        "defines no ElasticMoEError.nothing",
        "`elastic_moe/errors.py::ElasticMoEError.nothing`",
    ),
    (names_in_files, "defines no no_such_kernel", "`kernels/csrc/core/simd.h::no_such_kernel`"),
    (elastic_moe_commands, "no command swoop", "Run `elastic-moe swoop`."),
    (elastic_moe_commands, "no option --wings", "```sh\nelastic-moe sweep --wings 2\n```"),
    (elastic_moe_commands, "no option --wings", "```console\n$ elastic-moe sweep --wings\n```"),
    (options_alone, "--wings", "With `--wings 2` it flies."),
    (make_targets, "no target coffee", "`make coffee` helps."),
    (make_targets, "no target coffee", "```sh\nmake coffee\n```"),
    (python_modules, "experiments.nowhere", "`python -m experiments.nowhere`"),
    (python_modules, "no_such_module", "```console\n$ .venv/bin/python -m no_such_module\n```"),
    (dotted_names, "has no nothing", "`elastic_moe.lab.nothing()`"),
]


@pytest.mark.parametrize(("check", "finding", "text"), BAD)
def test_a_bad_page_is_found_out(check: Check, finding: str, text: str) -> None:
    found = check(Page("README.md", text))
    assert any(finding in one for one in found), found


def test_every_check_has_a_bad_page() -> None:
    assert {check for check, *_ in BAD} == set(CHECKS)


def test_folders_that_commands_write_are_not_of_the_repository(tmp_path: Path) -> None:
    """`make sweep` leaves a sweep-out/, and pages name files below it that other commands write."""
    for name in ("docs", "sweep-out", "runs", "build"):
        (tmp_path / name).mkdir()
    (tmp_path / ".gitignore").write_text("/sweep-out/\n/runs/\nbuild/\n*.so\n")
    assert top_level(tmp_path) == {"docs", ".ci", ".github"}
