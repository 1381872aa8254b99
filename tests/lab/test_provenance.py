"""A record says when, by which command, at which commit and on which processor it was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from elastic_moe.lab import provenance

CPUINFO = (
    "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\n"
    "model name\t: AMD EPYC\nstepping\t: 1\n\nprocessor\t: 1\nstepping\t: 9\n"
)


def test_a_record_states_date_command_commit_machine_and_versions(tmp_path: Path) -> None:
    script = "import json\nfrom elastic_moe.lab.provenance import describe_provenance as f\n"
    path = tmp_path / "measure.py"
    path.write_text(script + "print(json.dumps(f()))\n")
    before = datetime.now(UTC).replace(microsecond=0)
    command = [sys.executable, str(path), "--model", "two words", "/home/me/out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert list(found) == ["date", "command", "commit", "machine", "versions"]
    date = datetime.fromisoformat(found["date"])
    assert date.utcoffset() == UTC.utcoffset(None)
    assert before <= date <= datetime.now(UTC)
    assert found["command"] == f"{Path(sys.executable).name} measure.py --model 'two words' out"
    assert found["commit"] == provenance.describe_commit()


def test_the_processor_is_named_by_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A virtual machine may report no more of the name than "AMD EPYC"."""
    path = tmp_path / "cpuinfo"
    path.write_text(CPUINFO)
    monkeypatch.setattr(provenance, "_CPUINFO", path)
    machine = provenance.describe_machine()
    assert machine["cpu"] == "AMD EPYC"
    keys = ("cpu_vendor", "cpu_family", "cpu_model", "cpu_stepping")
    assert [machine[key] for key in keys] == ["AuthenticAMD", 25, 17, 1]


def test_a_system_without_cpuinfo_has_a_processor_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "_CPUINFO", tmp_path / "none")
    machine = provenance.describe_machine()
    assert machine["cpu"]
    assert machine["cpu_family"] is machine["cpu_vendor"] is None
