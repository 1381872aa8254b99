"""What may be trained on, and proof that nothing held out was."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from pathlib import Path

import pytest

from elastic_moe.errors import CorpusError
from elastic_moe.model.checkpoints.folder import BUNDLED
from elastic_moe.train.text.chats import docstrings
from elastic_moe.train.text.corpus import (
    HoldOut,
    is_left_out_of_library,
    library_files,
    text_files,
)
from experiments.elastic_mini import recipe

MINI = BUNDLED / "elastic-mini"
# The hold-out of elastic-mini; other corpora hold out nothing unasked.
HOLD_OUT = HoldOut(recipe.HOLD_OUT, recipe.HOLD_OUT_TEXTS)
AUTHORS = ("Chesterton", "Forster", "Gissing", "Schreiner")  # literally: not what the code says


@pytest.fixture(scope="module")
def manifest() -> dict:
    return json.loads((MINI / "manifest.json").read_text())


@pytest.fixture(scope="module")
def trained_on(manifest: dict) -> list[dict]:
    """The files of every training that led to the weights."""
    files: list[dict] = []
    part: dict | None = manifest
    while part is not None:
        files += part["corpus"]["files"]
        part = part.get("before")
    return files


def test_nothing_held_out_is_in_the_bundled_manifest(trained_on: list[dict]) -> None:
    files = trained_on
    assert len(files) > 500
    for entry in files:
        name = entry["name"]
        parts = name.split("/")
        assert parts[-1].partition(".")[0].lower() != "topics", name
        if entry["corpus"] in ("texts", "novels"):
            assert not any(author.lower() in name.lower() for author in AUTHORS), name
            assert "pydoc_data" not in parts
        else:
            assert entry["corpus"] == "library", name
            assert not any(part.startswith(("test", "pydoc_data", "idlelib")) for part in parts)
            assert "site-packages" not in parts


def test_no_trained_file_has_the_content_of_a_held_out_one(trained_on: list[dict]) -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    held_out = list((root / "pydoc_data").rglob("*.py"))
    assert held_out, "this Python has no pydoc_data to compare with"
    sums = {
        hashlib.sha256(path.read_bytes()).hexdigest() for path in held_out if path.stat().st_size
    }
    assert not sums & {entry["sha256"] for entry in trained_on}


def test_the_manifest_is_the_one_that_the_checkpoint_names(manifest: dict) -> None:
    files = json.dumps(manifest["corpus"]["files"], sort_keys=True)
    config = json.loads((MINI / "config.json").read_text())
    assert config["elastic_moe"]["corpus_sha256"] == hashlib.sha256(files.encode()).hexdigest()
    training = manifest["training"]
    tokens = training["tokens"] + training.get("tokens_before", 0)
    assert config["elastic_moe"]["tokens"] == tokens


@pytest.mark.parametrize(
    ("corpus", "name", "held_out"),
    [
        ("texts", "Dickens_Bleak_1853.txt", False),
        ("texts", "english/Dickens_Bleak_1853.txt", False),
        ("texts", "src/tests/test_x.py", False),  # of the library alone
        ("texts", "topics.txt", True),  # the language reference, saved as a text
        ("texts", "english/Topics.txt", True),
        ("texts", "python/pydoc_data/more.py", True),
        ("library", "textwrap.py", False),
        ("library", "topics.py", True),
        ("library", "json/decoder.py", False),
        ("library", "pydoc_data/topics.py", True),
        ("library", "test/test_json.py", True),
        ("library", "unittest/test/support.py", True),
        ("library", "lib2to3/tests/data/x.py", True),
        ("library", "idlelib/help.py", True),
        ("library", "site-packages/x.py", True),
    ],
)
def test_hold_outs_are_told_by_name(corpus: str, name: str, held_out: bool) -> None:
    if corpus == "library":
        assert is_left_out_of_library(name) is held_out
    else:
        assert HOLD_OUT.holds_path(Path("/corpus", name)) is held_out


@pytest.mark.parametrize("author", AUTHORS)
@pytest.mark.parametrize(
    "name",
    [
        "{}_View_1908.txt",
        "english/{}_View_1908.txt",
        "english/{}/View.txt",
        "{}.txt",
        "{} View.txt",
        "EM{}_View_1908.txt",
        "{lower}_view_1908.txt",
        "{upper}-VIEW.TXT",
    ],
)
def test_a_held_out_author_is_held_out_however_the_file_is_named(author: str, name: str) -> None:
    file = name.format(author, lower=author.lower(), upper=author.upper())
    assert HOLD_OUT.holds_path(Path("/corpus", file))


def test_listing_leaves_held_out_files_unread(tmp_path: Path) -> None:
    for author in ("Dickens", *AUTHORS):
        (tmp_path / f"{author}_Title_1900.txt").write_text(author)
    (tmp_path / "english").mkdir()
    (tmp_path / "english" / "Forster_View_1908.txt").write_text("Forster")
    (tmp_path / "topics.txt").write_text("The with statement")
    found = text_files(tmp_path, hold_out=HOLD_OUT)
    assert [f.name for f in found] == ["Dickens_Title_1900.txt"]
    assert found.skipped == {"held out": len(AUTHORS) + 2}
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text("x = 1")
    (tmp_path / "latin.py").write_bytes(b"# coding: latin-1\n# caf\xe9\n")
    (tmp_path / "good.py").write_text("x = 1")
    (tmp_path / "__init__.py").write_text("")
    library = library_files(tmp_path)
    assert [f.name for f in library] == ["__init__.py", "good.py"]
    assert library.skipped == {"left out": 1, "not UTF-8": 1}
    with pytest.raises(CorpusError, match="is not a folder"):
        text_files(tmp_path / "none", hold_out=HOLD_OUT)


@pytest.mark.parametrize("name", ["Forster", "pydoc_data"])
def test_a_held_out_folder_may_not_be_named_itself(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "a.txt").write_text("text")
    with pytest.raises(CorpusError, match=r"nothing to train on .*: 0 files.* 1 held out"):
        text_files(tmp_path / name, hold_out=HOLD_OUT)


def test_a_copy_of_the_evaluation_text_is_known_by_its_content(tmp_path: Path) -> None:
    topics = Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"
    (tmp_path / "innocent.py").write_bytes(topics.read_bytes())
    (tmp_path / "good.py").write_text("x = 1")
    found = text_files(tmp_path, hold_out=HOLD_OUT)
    assert [f.name for f in found] == ["good.py"]
    assert found.skipped == {"held out": 1}


@pytest.mark.parametrize("name", ["Forster/novels", "my Chesterton/a/b", "pydoc_data/x"])
def test_a_folder_inside_a_held_out_one_may_not_be_named_either(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "a.txt").write_text("text")
    with pytest.raises(CorpusError, match=r"nothing to train on .*: 0 files.* 1 held out"):
        text_files(tmp_path / name, hold_out=HOLD_OUT)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / name)
    with pytest.raises(CorpusError, match=r"nothing to train on .*: 0 files.* 1 held out"):
        text_files(link, hold_out=HOLD_OUT)
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "b.txt").symlink_to(tmp_path / name / "a.txt")
    with pytest.raises(CorpusError, match=r"nothing to train on .*: 0 files.* 1 held out"):
        text_files(tmp_path / "good", hold_out=HOLD_OUT)


def reference() -> str:
    """The language reference as it is evaluated on."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


DISGUISES = {
    "crlf": lambda _text, source: source.replace("\n", "\r\n"),
    "half of the source": lambda _text, source: source[: len(source) // 2],
    "half of the text": lambda text, _source: text[len(text) // 2 :],
    "a twentieth": lambda text, _source: text[9000 : 9000 + len(text) // 20],
    "rewrapped": lambda text, _source: " ".join(text.split()),
    "quoted": lambda text, _source: "> " + text.replace("\n", "\n> "),
    "upper case": lambda text, _source: text.upper(),
    "one topic": lambda text, _source: text.split("\n\n\n")[0][-2500:],
    "among novels": lambda text, _source: "Call me what you like. " * 60_000 + text[:20_000],
}


@pytest.mark.parametrize("disguise", DISGUISES)
def test_a_part_of_the_evaluation_text_is_known_in_a_disguise(
    disguise: str, tmp_path: Path
) -> None:
    topics = Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"
    text = DISGUISES[disguise](reference(), topics.read_text())
    (tmp_path / "mine.txt").write_bytes(text.encode())
    (tmp_path / "good.txt").write_text("Of my own. " * 1000)
    found = text_files(tmp_path, hold_out=HOLD_OUT)
    assert [f.name for f in found] == ["good.txt"]
    assert found.skipped == {"held out": 1}


def test_what_a_module_says_as_well_is_not_held_out(tmp_path: Path) -> None:
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    modules = library_files()
    assert len(modules) > 400
    names = {f.name for f in modules}
    assert {"pdb.py", "textwrap.py", "json/decoder.py", "typing.py"} <= names
    # The library's own copy, read as a folder of texts: no module is taken for the reference.
    own = [f.name for f in modules if "/" not in f.name]
    for name in own:
        (tmp_path / name).write_bytes((stdlib / name).read_bytes())
    found = text_files(tmp_path, hold_out=HOLD_OUT)
    assert sorted(f.name for f in found) == sorted(f.name for f in modules if f.name in own)
    assert found.skipped == {}


def test_nothing_is_held_out_of_a_corpus_unless_it_is_asked_for(tmp_path: Path) -> None:
    topics = Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"
    for name in ("forster/notes.md", "topics.md", "pydoc_data/own.txt", "Gissing.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "reference.py").write_bytes(topics.read_bytes())
    found = text_files(tmp_path)
    assert len(found) == 5
    assert found.skipped == {}
    assert found.held_out == ()
    some = text_files(tmp_path, hold_out=HoldOut(patterns=("forster", "TOPICS.*")))
    assert [f.name for f in some] == ["Gissing.txt", "pydoc_data/own.txt", "reference.py"]
    assert some.held_out == ("forster/notes.md", "topics.md")
    assert some.skipped == {"held out": 2}


def test_a_text_of_ones_own_is_held_out_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    poem = " ".join(f"The {n}th of the thousand things that the author thought." for n in range(99))
    (tmp_path / "poem.txt").write_text(poem)
    (tmp_path / "texts" / "copy.txt").write_text("> " + poem.upper().replace(". ", ".\n> "))
    (tmp_path / "texts" / "other.txt").write_text("Of my own. " * 1000)
    found = text_files(tmp_path / "texts", hold_out=HoldOut(texts=(tmp_path / "poem.txt",)))
    assert found.held_out == ("copy.txt",)
    with pytest.raises(CorpusError, match=r"none has no text to hold out\. Name a file"):
        text_files(tmp_path / "texts", hold_out=HoldOut(texts=(tmp_path / "none",)))


def test_a_pipe_or_a_linked_folder_is_counted_and_not_read(tmp_path: Path) -> None:
    (tmp_path / "texts" / "locked").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("text")
    (tmp_path / "texts" / "a.txt").write_text("text")
    (tmp_path / "texts" / "link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "texts" / "pipe")
    found = text_files(tmp_path / "texts")
    assert [f.name for f in found] == ["a.txt"]
    assert found.skipped == {"linked folders": 1, "no file": 1}


def test_a_link_to_itself_is_counted_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "one").symlink_to("other")
    (tmp_path / "other").symlink_to("one")
    found = text_files(tmp_path)
    assert [f.name for f in found] == ["a.txt"]
    assert found.skipped == {"unreadable": 3}


def test_the_run_itself_and_other_runs_are_no_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for name in ("own", "earlier", "notes"):
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "data" / "manifest.json").write_text("{}")
    for name in ("plan.json", "log.jsonl"):
        (tmp_path / "earlier" / name).write_text("{}")
    found = text_files(tmp_path, leave_out=tmp_path / "notes" / ".." / "own")
    assert [f.name for f in found] == ["a.txt", "notes/data/manifest.json"]
    assert found.skipped == {"training runs": 2}


def test_a_text_that_changed_since_it_was_listed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (file,) = text_files(tmp_path)
    assert file.read() == "text"
    (tmp_path / "a.txt").write_bytes(b"other \xff")
    with pytest.raises(CorpusError, match=r"a\.txt changed while it was read"):
        file.read()


def test_a_folder_that_may_not_be_entered_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "locked").mkdir()
    (tmp_path / "a.txt").write_text("text")
    scandir = os.scandir

    def refuse(path: str) -> object:  # root may enter everything
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = text_files(tmp_path)
    assert [f.name for f in found] == ["a.txt"]
    assert found.skipped == {"unreadable": 1}


def test_every_text_below_a_folder_is_read_and_every_other_file_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("README", "a/notes.md", "a/b/code.py", "data.csv"):
        (tmp_path / name).write_text("text é")
    (tmp_path / "cut.bin").write_bytes(b"text\0text")
    (tmp_path / "late.bin").write_bytes(b"x" * 20_000 + b"\0")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("text")
    (tmp_path / "a" / ".hidden").write_text("text")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    found = text_files(tmp_path)
    assert [f.name for f in found] == ["README", "a/b/code.py", "a/notes.md", "data.csv"]
    assert {f.num_bytes for f in found} == {7}
    assert {f.sha256 for f in found} == {hashlib.sha256("text é".encode()).hexdigest()}
    reasons = {"binary": 2, "empty": 1, "hidden": 2, "not UTF-8": 1, "unreadable": 1}
    assert found.skipped == reasons
    assert found.describe() == (
        "4 files, 0.0 MB; skipped 7: 2 binary, 1 empty, 2 hidden, 1 not UTF-8, 1 unreadable"
    )
    some = text_files(tmp_path, ["*.md", "a/*.py"])
    assert [f.name for f in some] == ["a/b/code.py", "a/notes.md"]
    assert some.skipped == {"hidden": 2, "not included": 7}
    with pytest.raises(
        CorpusError, match=r"0 files, 0\.0 MB; skipped 11: 2 hidden, 9 not included"
    ):
        text_files(tmp_path, ["*.rst"])


def test_docstrings_come_with_their_dotted_names(tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text(
        '"""Pack."""\nclass A:\n    """An A."""\n    def f(self):\n        """Do f."""\n'
    )
    (tmp_path / "broken.py").write_text("def (:")
    broken, pack = library_files(tmp_path)
    assert list(docstrings(broken)) == []
    found = [(d.name, d.kind, d.text) for d in docstrings(pack)]
    assert found == [
        ("pack", "module", "Pack."),
        ("pack.A", "class", "An A."),
        ("pack.A.f", "function", "Do f."),
    ]
