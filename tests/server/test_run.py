"""The command: it listens, says where, and ends in good order."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from elastic_moe.cli import main

SERVE = [sys.executable, "-m", "elastic_moe.cli", "serve"]


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process of its own, and its URL."""
    command = [*SERVE, str(folder), "--port", "0", "--seed", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        try:
            yield process, line.split(" on ")[1].strip().removesuffix("/v1")
        finally:
            process.kill()


def read_streams(url: str, count: int, tokens: int) -> tuple[list[threading.Thread], list[str]]:
    """Clients that stream, and what they got once they have ended; all have begun."""
    got, begun = [""] * count, threading.Barrier(count + 1)

    def read(number: int) -> None:
        body = {"model": "tiny", "prompt": "The", "max_tokens": tokens, "ignore_eos": True}
        asked = {**body, "stream": True, "seed": number}
        with httpx2.stream("POST", f"{url}/v1/completions", json=asked, timeout=60) as answer:
            lines = answer.iter_lines()
            got[number] = next(lines)
            begun.wait()
            got[number] += "".join(lines)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    begun.wait()
    return threads, got


def test_requests_without_a_seed_take_that_of_the_command(tiny_folder: Path) -> None:
    body = {"model": "tiny", "prompt": "The", "max_tokens": 12, "ignore_eos": True}
    with serving(tiny_folder, "--seed", "-7") as (_, url):
        texts = [
            httpx2.post(f"{url}/v1/completions", json=asked).json()["choices"][0]["text"]
            for asked in (body, body, {**body, "seed": -7}, {**body, "seed": 7})
        ]
    assert texts[0] == texts[1] == texts[2] != texts[3]


@pytest.mark.parametrize(("drain", "whole"), [("60", True), ("0", False)])
def test_told_to_end_it_lets_streams_end_or_tells_them(
    tiny_folder: Path, drain: str, whole: bool
) -> None:
    with serving(tiny_folder, "--drain-seconds", drain) as (process, url):
        assert httpx2.get(f"{url}/ready").status_code == 200
        threads, got = read_streams(url, 20, 500)
        process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        for thread in threads:
            thread.join(60)
        assert process.wait(20) == 0
        assert time.monotonic() - start < 30
    for text in got:
        assert text.endswith("data: [DONE]")
        last = json.loads(text.split("data: ")[-2])
        if whole:
            assert last["choices"][0]["finish_reason"] == "length"
        else:
            assert "closed" in last["error"]["message"]


def test_a_taken_port_is_a_plain_message(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", str(tiny_folder), "--port", port]) == 2
    reported = capsys.readouterr().err
    assert f"port {port} of 127.0.0.1 is taken" in reported
    assert "Traceback" not in reported


def test_keys_come_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from elastic_moe.cli.serve import read_keys
    from elastic_moe.errors import ServerError

    file = tmp_path / "keys"
    file.write_text("# ours\none\n\n two \n")
    monkeypatch.setenv("ELASTIC_MOE_API_KEYS", "three, four,")
    assert read_keys(file) == ("one", "two")
    assert read_keys(None) == ("three", "four")
    file.write_text("# none\n")
    with pytest.raises(ServerError, match="has no keys"):
        read_keys(file)
    with pytest.raises(ServerError, match="cannot be read"):
        read_keys(tmp_path / "absent")


def test_it_does_not_listen_to_others_without_keys(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ELASTIC_MOE_API_KEYS", raising=False)
    assert main(["serve", str(tiny_folder), "--host", "0.0.0.0", "--port", "0"]) == 2
    assert "no API key is set" in capsys.readouterr().err


def test_the_options_of_an_operator_reach_the_server(tiny_folder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "admin.txt"
    keys.write_text("admin-key\n")
    profiles = tmp_path / "profiles.toml"
    options = ["--inject", "remote", "--admin-keys", str(keys), "--profiles", str(profiles)]
    options += ["--max-depth", "3", "--min-top-k", "2", "--max-sparsity", "0.5", "--max-width", "2"]
    admin = {"authorization": "Bearer admin-key"}
    with serving(tiny_folder, *options) as (_, url), httpx2.Client(base_url=url) as http:
        config = {"top_k": 1, "sparsity": 0.9, "expert_width": 3}
        body = {"model": "tiny", "prompt": "The", "max_tokens": 1, "routing_config": config}
        routing = http.post("/v1/completions", json=body, timeout=60).json()["routing"]
        assert routing["name"] == "L3-k2-w2-t0.5"
        assert set(routing["limited"]) == {"depth", "top_k", "sparsity", "expert_width"}
        state = http.get("/admin/faults", headers=admin).json()
        assert state["plan"]["preset"] == "remote"
        assert profiles.exists()
    with serving(
        tiny_folder, "--max-depth", "3", "--beyond-limits", "refuse", "--routing", "L3"
    ) as (
        _,
        url,
    ):
        body = {"model": "tiny@L4", "prompt": "The", "max_tokens": 1}
        assert httpx2.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 400
