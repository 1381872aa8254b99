"""The documentation as data: its pages, their code blocks, and the prose between them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced code block.

    Attributes:
        kind: `sh` (each line runs as a test), `bash` (a script, runs as a whole), `python` (runs),
            `console` (lines after `$ ` are checked, but do not run), `text`, `toml`.
    """

    kind: str
    text: str

    @property
    def commands(self) -> list[str]:
        """Command lines without comments; of `console` those after the prompt."""
        if self.kind == "console":
            lines = [line[2:] for line in self.text.splitlines() if line.startswith("$ ")]
        elif self.kind in {"sh", "bash"}:
            lines = self.text.splitlines()
        else:
            lines = []
        return [bare for line in lines if (bare := line.split("  #")[0].strip())]


@dataclass(frozen=True)
class Page:
    """A markdown file; `name` is its path from the root."""

    name: str
    text: str

    @property
    def blocks(self) -> list[Block]:
        return [Block(kind, text) for kind, text in _BLOCK.findall(self.text)]

    @property
    def prose(self) -> str:
        """The text without code blocks, its lines kept."""
        return _BLOCK.sub("", self.text)

    @property
    def flat(self) -> str:
        """The text in one line, for sentences that a line break divides."""
        return " ".join(self.text.split())


def read(name: str) -> Page:
    return Page(name, (ROOT / name).read_text(encoding="utf-8"))


def pages() -> list[Page]:
    """README.md, CONTRIBUTING.md, SECURITY.md and every page below docs/."""
    top = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
    found = [*top, *sorted((ROOT / "docs").rglob("*.md"))]
    return [read(str(path.relative_to(ROOT))) for path in found if path.exists()]
