"""The team of threads (csrc/core/threads.cpp): races, forks, ends."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from elastic_moe_kernels import native

ROOT = Path(__file__).parents[2]
SOURCES = [Path(__file__).with_name("team_test.cpp"), ROOT / "kernels/csrc/core/threads.cpp"]
pytestmark = pytest.mark.skipif(bool(native.missing()), reason="the C++ kernels are not installed")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the test with")
@pytest.mark.parametrize(("sanitizers", "forks"), [("thread", "0"), ("address,undefined", "50")])
def test_calls_and_forks_under_sanitizers(sanitizers: str, forks: str, tmp_path: Path) -> None:
    program = tmp_path / "team_test"
    compiler = ["g++", "-std=c++17", "-O1", "-g", f"-fsanitize={sanitizers}", "-Wall", "-Wextra"]
    subprocess.run(
        [*compiler, "-Werror", "-I", ROOT / "kernels/csrc", *SOURCES, "-pthread", "-o", program],
        check=True,
    )
    done = subprocess.run(
        [program, "4000", forks],
        # Helpers may outlive main(); a sanitizer that all processes load is not this program's.
        env={k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
        | {"ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr[:4000]) == (0, "done\n", "")


THREADS = """
import json, os
import numpy as np
from elastic_moe_kernels import native
extension = native.extension()
extension.assume_free_cores(8)  # however busy the machine is
data = np.zeros(1 << 20, np.uint8)
def call():
    extension.probe_read(0, data, 0, 3)
def threads():
    return len(os.listdir("/proc/self/task"))
before = threads()
"""


def run(code: str) -> object:
    """What the code prints as JSON, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", THREADS + code],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc counts threads")
def test_helpers_come_with_the_first_call_and_end_when_asked() -> None:
    found = run(
        "call(); during = threads() - before, extension.helper_count()\n"
        "extension.stop_threads()\n"
        "import time\n"
        "for _ in range(1000):\n"
        "    if threads() == before: break\n"
        "    time.sleep(0.01)\n"
        "after = threads() - before\n"
        "call(); again = threads() - before\n"
        "print(json.dumps([during, after, again]))"
    )
    assert found == [[2, 2], 0, 2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_helpers_of_its_own() -> None:
    found = run(
        "call()\n"
        "read, write = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    alone = threads()\n"
        "    call()\n"
        "    os.write(write, json.dumps([alone, threads()]).encode())\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "print(os.read(read, 100).decode())"
    )
    assert found == [1, 3]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/loadavg")
def test_no_helper_takes_part_where_other_programs_want_all_cores() -> None:
    loops = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(4 * (os.cpu_count() or 1) + 4)
    ]
    try:
        found = run(
            "import time\n"
            "extension.assume_free_cores(0)\n"
            "def for_a_while():\n"
            "    end = time.monotonic() + 0.5\n"
            "    while time.monotonic() < end: call()\n"
            "for_a_while()\n"
            "extension.stop_threads()\n"
            "for_a_while()\n"
            "asked = extension.helper_count()\n"
            "extension.assume_free_cores(8)\n"
            "call()\n"
            "print(json.dumps([asked, extension.helper_count()]))"
        )
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    assert found == [0, 2]
