"""Which implementations and levels there are, how they are chosen, and what is mapped for them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from elastic_moe_kernels import native, ops
from elastic_moe_kernels.errors import KernelError

CSRC = Path(__file__).parents[2] / "kernels" / "csrc"
CPUINFO = Path("/proc/cpuinfo")


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


ROUTE = """
import torch
from elastic_moe_kernels import native, ops
from elastic_moe_kernels.errors import KernelError
from elastic_moe_kernels.table import build_table
from elastic_moe.routing.subnet import full_layer
sizes = {"num_experts": 64, "max_top_k": 4, "width_granules": 1}
table = build_table([[full_layer(sizes)]], 64, 1).layer(0)
def route(rows):
    subnet_of_row = torch.zeros(rows, dtype=torch.int64)
    return ops.route(torch.zeros(rows, 64), table, subnet_of_row, renormalize=True)
"""


@pytest.mark.parametrize("level", native.levels())
def test_environment_chooses_the_level(level: str) -> None:
    code = ROUTE + "print(native.level(), route(1)[0].tolist())"
    assert run(code, ELASTIC_MOE_ISA=level) == f"{level} [[0, 1, 2, 3]]"


def test_strongest_level_is_the_default() -> None:
    assert run(ROUTE + "print(native.level())", ELASTIC_MOE_ISA="") == native.levels()[-1]


def test_levels_that_run_are_those_whose_instructions_linux_names() -> None:
    flags = set(re.search(r"^flags\s*:(.*)$", CPUINFO.read_text(), re.MULTILINE)[1].split())
    needed = {
        "portable": set(),
        "avx2": {"avx2", "fma"},
        "avx512f": {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
    }
    needed["avx512"] = needed["avx512f"] | {"avx512_bf16"}
    built = native.build_info().levels
    assert native.levels() == tuple(level for level in built if needed[level] <= flags)


def test_unknown_level_is_refused_and_not_replaced() -> None:
    code = ROUTE + "try: route(1)\nexcept KernelError as error: print(error)"
    message = run(code, ELASTIC_MOE_ISA="avx9000")
    assert message.startswith("ELASTIC_MOE_ISA must be one of portable")
    assert "'avx9000'" in message


def test_level_that_the_machine_lacks_is_refused() -> None:
    lacking = sorted(set(native.build_info().levels) - set(native.levels()))
    if not lacking:
        pytest.skip("this machine runs every level")
    with pytest.raises(KernelError, match=rf"level must be one of .*, got '{lacking[0]}'"):
        native.level_index(lacking[0])


def test_backends_say_what_there_is() -> None:
    reference, cpu = ops.backends()
    assert (reference.name, reference.available) == ("reference", True)
    assert (cpu.name, cpu.available) == ("cpu", True)
    assert cpu.levels == native.levels()
    assert cpu.level in cpu.levels
    assert native.build_info().compiler in cpu.detail
    assert ops.available("cpu")
    assert not ops.available("cuda")
    ops.require("cpu")


def test_users_can_read_about_every_level() -> None:
    page = CSRC.parents[1] / "docs" / "kernels.md"
    rows = re.findall(r"^\| `(\w+)` \|", page.read_text(), re.MULTILINE)
    assert rows == list(native.build_info().levels), "the table of levels in docs/kernels.md"


def test_code_by_instruction_set_is_in_three_files() -> None:
    """Who adds a level looks nowhere else."""
    macro = re.compile(r"__(AVX|FMA|F16C|AMX)\w*__")
    sources = [path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp")]
    found = {str(path.relative_to(CSRC)) for path in sources if macro.search(path.read_text())}
    assert found == {"core/simd.h", "core/values.h", "core/tile.h"}, (
        "branch on a level's macros in these three files alone, as CONTRIBUTING says"
    )


def test_levels_are_in_order_of_strength() -> None:
    assert list(native.levels()) == [
        name for name in native.build_info().levels if name in native.levels()
    ]
    assert native.levels()[0] == "portable"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("first", ["torch.set_num_threads(2)", "route(4096)"])
def test_one_openmp_library_is_mapped(first: str) -> None:
    """Whether torch or the kernel opens the first parallel region."""
    code = (
        ROUTE
        + first
        + """
route(4096)
torch.mm(torch.ones(512, 512), torch.ones(512, 512))
route(4096)
import json
paths = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
openmp = ("libgomp", "libomp", "libiomp")
print(json.dumps(sorted(p for p in paths if p.rsplit("/", 1)[-1].startswith(openmp))))
"""
    )
    mapped = json.loads(run(code, OMP_NUM_THREADS="2"))
    assert len(mapped) == 1, mapped


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_few_rows_need_no_helper_and_many_have_one_beside_torchs() -> None:
    code = (
        ROUTE
        + """
import os
native.extension().assume_free_cores(8)  # however busy the machine is
def threads(): return len(os.listdir("/proc/self/task"))
torch.set_num_threads(2)
route(1)
torch.ones(1 << 20).exp().sum()
before = threads()
route(1)
few = threads()
route(4096)
print([few - before, threads() - before])
"""
    )
    assert run(code) == "[0, 1]"
