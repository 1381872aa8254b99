"""Folders change places as a whole."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from elastic_moe import files
from elastic_moe.files import exchanging_folder


def fill(folder: Path, text: str) -> None:
    with exchanging_folder(folder) as beside:
        for name in ("a", "b"):
            (beside / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_new_folder_takes_the_place_of_the_old_one(
    can_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:  # as on another system
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    folder = tmp_path / "folder"
    fill(folder, "1")
    (folder / "old").write_text("x")
    fill(folder, "2")
    assert contents(folder) == {"a": "2", "b": "2"}
    with pytest.raises(IsADirectoryError), exchanging_folder(folder) as beside:
        beside.write_text("3")
    assert contents(folder) == {"a": "2", "b": "2"}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_reader_finds_a_whole_folder_at_every_moment(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    fill(folder, "0")
    (tmp_path / "x").mkdir()
    if not files._exchange(folder, tmp_path / "x"):
        pytest.skip("this file system cannot exchange two folders")
    files._exchange(folder, tmp_path / "x")
    missing, done = [], threading.Event()

    def read() -> None:
        while not done.is_set():
            missing.extend(name for name in ("a", "b") if not (folder / name).exists())

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(50):
        fill(folder, str(number))
    done.set()
    reader.join()
    assert missing == []
    assert contents(folder) == {"a": "49", "b": "49"}
