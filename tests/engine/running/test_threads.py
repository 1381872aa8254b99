"""Engines leave no thread behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from elastic_moe_kernels import native

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
