"""A server that programs start: it tells where it is once it is ready, and ends with them."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest

from elastic_moe.cli import main

SERVE = [sys.executable, "-m", "elastic_moe.cli", "serve"]


def test_its_file_is_there_while_it_is_ready_and_it_ends_with_its_input(
    tiny_folder: Path, tmp_path: Path
) -> None:
    url_file = tmp_path / "url"
    url_file.write_text("http://127.0.0.1:1\n")  # of a server that was killed
    command = [*SERVE, str(tiny_folder), "--port", "0", "--seed", "0", "--url-file", str(url_file)]
    with subprocess.Popen(
        [*command, "--end-with-stdin"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        try:
            assert process.stdin is not None
            until, seen = time.monotonic() + 60, {"http://127.0.0.1:1\n"}
            while len(seen) < 2:
                assert process.poll() is None
                assert time.monotonic() < until
                try:
                    seen.add(url_file.read_text())
                except FileNotFoundError:
                    time.sleep(0.001)
            url = max(seen, key=len).strip()
            assert httpx2.get(f"{url}/ready").status_code == 200
            process.stdin.write(b"what comes is not looked at\n")
            process.stdin.flush()
            time.sleep(0.1)
            assert httpx2.get(f"{url}/ready").status_code == 200
            process.stdin.close()
            assert process.wait(20) == 0
        finally:
            process.kill()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_is_told_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = tmp_path / "absent" / "url"
    assert main(["serve", str(tmp_path), "--port", "0", "--url-file", str(absent)]) == 2
    reported = capsys.readouterr().err
    assert f"--url-file {absent} cannot be written: No such file or directory." in reported
    assert main(["serve", str(tmp_path), "--port", "0", "--url-file", str(tmp_path)]) == 2
    assert f"--url-file {tmp_path} cannot be written: Is a directory." in capsys.readouterr().err
