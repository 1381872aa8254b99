"""How many threads an engine takes, and that it leaves none behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from elastic_moe_kernels import native

from elastic_moe.engine.config import allowed_cores

ENGINES = """
import gc, json, os, sys, time
from elastic_moe import Engine, SamplingParams
from elastic_moe_kernels import native
native.extension().assume_free_cores(8)  # however busy the machine is
folder, count = sys.argv[1], int(sys.argv[2])
def threads():
    return len(os.listdir("/proc/self/task"))
found = []
for i in range(count):
    with Engine.from_pretrained(folder, backend="cpu", num_threads=3) as engine:
        engine.generate([5, 6, 7], None, SamplingParams(max_tokens=3, ignore_eos=True))
        during = native.extension().helper_count()
    del engine
    gc.collect()
    end = time.monotonic() + 20
    if i == 0:
        before = threads()
    while native.extension().helper_count() or threads() > before:
        assert time.monotonic() < end, (threads(), before)
        time.sleep(0.001)
    found.append(during)
print(json.dumps(sorted(set(found))))
"""


@pytest.mark.skipif(bool(native.missing()), reason="the C++ kernels are not installed")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc counts threads")
def test_engines_made_and_closed_leave_no_thread(tiny_folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENGINES, tiny_folder, "20"],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert json.loads(done.stdout) == [2]


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 64),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 64),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "250000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "200000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "10000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/a\n0::/\n",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            64,
        ),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "unreadable\n"}, 64),
    ],
    ids=["none", "max", "v2", "outer", "part-of-a-core", "v1", "v1-none", "unreadable"],
)
def test_a_quota_of_cpu_time_limits_the_cores(
    files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert allowed_cores(tmp_path) == cores
