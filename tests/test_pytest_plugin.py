"""The plugin as users get it: in a pytest of its own, loaded by its entry point."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from elastic_moe.testing import start_server

pytest_plugins = "pytester"

ROOT = Path(__file__).resolve().parents[1]
USE = """
import os, signal, time
import openai
import pytest

def ask(**more):
    return openai.OpenAI().completions.create(
        model=os.environ["OPENAI_MODEL"], prompt="The", **more
    )

@pytest.fixture(scope="session")
def noted(elastic_moe_server):
    with open("noted", "a") as file:
        print(elastic_moe_server.pid, elastic_moe_server.healthy, file=file)
"""


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return not re.search(r"^State:\s+Z", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except FileNotFoundError:
        return False


def gone(pid: int, seconds: float) -> bool:
    """Whether a process ends in this time."""
    until = time.monotonic() + seconds
    while alive(pid):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def report(result: pytest.RunResult) -> str:
    """What it printed before the summary: in CI that repeats every message at full length."""
    return result.stdout.str().partition("short test summary info")[0]


def noted(pytester: pytest.Pytester) -> list[int]:
    """Process ids of the servers that were started; each was ready."""
    lines = (pytester.path / "noted").read_text().splitlines()
    assert all(line.endswith(" True") for line in lines)
    return [int(line.split()[0]) for line in lines]


# --- what it costs those who do not use it


def test_importing_it_is_quick_and_loads_next_to_nothing():
    """Best of several: what else runs on the machine only adds."""
    code = (
        "import pytest, sys, time\n"
        "before = set(sys.modules); start = time.perf_counter()\n"
        "import elastic_moe.pytest_plugin\n"
        "print(time.perf_counter() - start, *sorted(set(sys.modules) - before))"
    )
    seconds = []
    for _ in range(5):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        reported, *loaded = done.stdout.split()
        seconds.append(float(reported))
    assert {"elastic_moe", "elastic_moe.pytest_plugin"} <= set(loaded)
    outside = {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names
    assert outside == {"elastic_moe"}
    assert not {"elastic_moe.errors", "elastic_moe.testing"} & set(loaded)
    assert min(seconds) < 0.05, seconds


def test_the_fixtures_need_nothing_but_the_standard_library_and_pytest():
    code = (
        "import pytest, sys; before = set(sys.modules)\n"
        "import elastic_moe.pytest_plugin, elastic_moe.testing as t\n"
        "[getattr(t, name) for name in t.__all__]\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert "elastic_moe.testing.resilience" in loaded
    assert {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names == {"elastic_moe"}


def test_who_does_not_use_it_does_not_notice(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import sys, threading
        def test_nothing_has_happened(request):
            assert request.config.pluginmanager.hasplugin("elastic_moe")
            loaded = {n for n in sys.modules if n.startswith("elastic_moe.")}
            assert loaded == {"elastic_moe.pytest_plugin"}
            assert not {"torch", "pydantic", "numpy"} & set(sys.modules)
            assert threading.active_count() == 1
        def test_that_fails():
            assert not "this"
        """
    )
    # An editable install's hook is imported before pytest, which then warns by the path of its own
    # environment: the name of the folder that a clone lies in, which nothing here prints.
    result = pytester.runpytest_subprocess("-W", "ignore::pytest.PytestAssertRewriteWarning")
    result.assert_outcomes(passed=1, failed=1, warnings=0)
    assert "elastic-moe" not in result.stdout.str().partition("collected")[2]


def test_its_options_and_ini_keys_bear_its_name(pytester: pytest.Pytester) -> None:
    with_it = pytester.runpytest_subprocess("--help").stdout.str()
    without = pytester.runpytest_subprocess("--help", "-p", "no:elastic_moe").stdout.str()

    def names(text: str) -> set[str]:
        return set(re.findall(r"^  (--?[\w-]+|[a-z_]+(?= \())", text, flags=re.MULTILINE))

    assert names(with_it) - names(without) == {
        *(f"--elastic-moe-{name}" for name in NAMES),
        *(f"elastic_moe_{name.replace('-', '_')}" for name in NAMES),
    }


NAMES = ["model", "routing", "isa", "dtype", "seed", "alias", "api-key", "args"]


# --- what it gives


def test_a_suite_that_uses_it(pytester: pytest.Pytester, tiny_folder: Path) -> None:
    """One server for all tests; each has its own requests and faults."""
    pytester.makepyfile(
        USE
        + """
def test_the_client_of_openai_just_works(openai_env):
    server = openai_env
    assert server.base_url == os.environ["OPENAI_BASE_URL"] == server.url + "/v1"
    assert os.environ["OPENAI_API_BASE"] == server.base_url
    assert os.environ["OPENAI_API_KEY"] == server.api_key
    assert os.environ["OPENAI_MODEL"] == server.model == "tiny"
    assert "OPENAI_ORG_ID" not in os.environ
    assert os.environ["NO_PROXY"] == "example.com,127.0.0.1"
    assert os.environ["no_proxy"] == "127.0.0.1"
    assert ask(logprobs=1).choices[0].logprobs.token_logprobs
    (record,) = server.requests
    assert (record.method, record.path, record.status) == ("POST", "/v1/completions", 200)
    assert record.body["prompt"] == "The" and not record.stream and record.injected is None
    assert record.outcome == "complete" and record.ended_seconds > record.begun_seconds

def test_the_environment_is_as_it_was(elastic_moe_server):
    assert "OPENAI_API_KEY" not in os.environ
    assert os.environ["OPENAI_ORG_ID"] == "acme"
    assert elastic_moe_server.requests == []
    assert len(elastic_moe_server.requests_after(0)) == 1

def test_faults_are_injected(openai_env, elastic_moe_faults):
    elastic_moe_faults.add(error=429, retry_after=0.1, count=1).remote()
    ask()
    assert [r.status for r in openai_env.requests] == [429, 200]
    assert openai_env.requests[0].injected["retry_after"] == 0.1
    assert elastic_moe_faults.injected == [1]
    assert openai_env.requests[1].ended_seconds - openai_env.requests[1].begun_seconds > 0.2
    elastic_moe_faults.clear()
    with elastic_moe_faults.add(force_text="It was I."):
        assert ask(stop=[]).choices[0].text.strip() == "It was I."
    elastic_moe_faults.add(error=503)

def test_and_end_with_their_test(openai_env):
    ask()
    assert len(openai_env.requests) == 1

def test_a_fault_that_does_not_exist(elastic_moe_faults):
    with pytest.raises(Exception, match="error: Input should be .* 599, got 600"):
        elastic_moe_faults.add(error=600)

def test_options_reach_the_server(openai_env):
    raw = openai.OpenAI().completions.with_raw_response.create(model="mine", prompt="The")
    assert raw.headers["x-elastic-subnet"] == "L3"
    assert raw.parse().system_fingerprint == "em-cpu-portable-float32"
    asked = {"model": "mine", "prompt": "The", "max_tokens": 12}
    again = [openai.OpenAI().completions.create(**asked, **own) for own in ({}, {}, {"seed": 7})]
    assert len({one.choices[0].text for one in again}) == 1
    with pytest.raises(openai.NotFoundError):
        ask(extra_body={"model": "ernie-5.1-prod"})

def test_that_fails(openai_env):
    for _ in range(30):
        openai.OpenAI().models.list()
    ask(stream=True).close()
    openai_env.settled()
    assert 0

def test_that_fails_without_requests(elastic_moe_server):
    assert 0

def test_that_kills_it(elastic_moe_server):
    os.kill(elastic_moe_server.pid, signal.SIGKILL)
    while not elastic_moe_server.fault():
        time.sleep(0.01)
    assert not elastic_moe_server.healthy
    assert 0

def test_that_needs_it(openai_env):
    pass

def test_that_does_not():
    pass
"""
    )
    pytester.makeini(
        f"""
        [pytest]
        elastic_moe_model = {os.path.relpath(tiny_folder, pytester.path)}
        elastic_moe_alias = yours, mine
        elastic_moe_dtype = bfloat16
        elastic_moe_seed = 7
        elastic_moe_args = --routing L3
        addopts = --strict-config --strict-markers
        filterwarnings =
            error
            ignore:Module already imported so cannot be rewritten; _editable
        """
    )
    patch = pytest.MonkeyPatch()
    with patch.context() as environment:
        for name in ("OPENAI_API_KEY", "no_proxy"):
            environment.delenv(name, raising=False)
        environment.setenv("OPENAI_ORG_ID", "acme")
        environment.setenv("NO_PROXY", "example.com")
        result = pytester.runpytest_subprocess(
            "--elastic-moe-isa=portable", "--elastic-moe-dtype=float32"
        )
    result.assert_outcomes(passed=7, failed=3, errors=1)
    text = report(result)
    assert text.count("elastic-moe requests") == 1
    section = text.partition("elastic-moe requests")[2].partition("____")[0]
    assert len(section.splitlines()) < 25
    assert "GET /v1/models -> 200, complete" in section
    assert "... 11 more" in section
    assert re.search(r"POST /v1/completions stream -> 200, (complete|gone) after 0", section)
    parts = re.split(r" ?_{3,} ?", text)  # of the report: a title, what it says, a title
    for title in ("ERROR at setup of test_that_needs_it", "test_that_kills_it"):
        reported = parts[parts.index(title) + 1]
        assert len(re.findall(r"the elastic-moe server at http://.* has ended", reported)) == 1
        assert "POST /v1/completions 200" in reported  # what it wrote
        assert "exit status -9" in reported


def test_every_worker_has_its_own_server(pytester: pytest.Pytester, tiny_folder: Path) -> None:
    pytester.makepyfile(
        USE
        + """
import pathlib
@pytest.mark.parametrize("number", [0, 1])
def test_two_at_a_time(openai_env, noted, number):
    ask()
    assert len(openai_env.requests) == 1
    until = time.monotonic() + 60
    while len(pathlib.Path("noted").read_text().splitlines()) < 2:
        assert time.monotonic() < until
        time.sleep(0.01)
"""
    )
    result = pytester.runpytest_subprocess("-n2", f"--elastic-moe-model={tiny_folder}")
    result.assert_outcomes(passed=2)
    pids = noted(pytester)
    assert len(set(pids)) == 2
    assert not any(map(alive, pids))


def test_a_server_that_does_not_start_is_a_plain_message(pytester: pytest.Pytester) -> None:
    """The level is not there. Without the kernels the reference would run, at no level: no."""
    pytester.makepyfile("def test_it(openai_env): pass")
    result = pytester.runpytest_subprocess("--elastic-moe-isa=avx9000")
    result.assert_outcomes(errors=1)
    text = report(result).partition("ERROR at setup of test_it")[2]
    assert re.search(r"elastic-moe serve elastic-mini .*--backend cpu did not start:", text)
    assert len(re.findall("ELASTIC_MOE_ISA must be one of portable.* got 'avx9000'", text)) == 1
    assert "the server has ended with exit status 1" in text
    assert "pytest_plugin.py" not in text


def test_a_seed_that_is_none_is_a_plain_message(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it(openai_env): pass")
    result = pytester.runpytest_subprocess("--elastic-moe-seed=x")
    result.assert_outcomes(errors=1)
    assert "elastic_moe_seed must be an integer, got 'x'." in report(result)
    assert "pytest_plugin.py" not in report(result)


def test_the_server_ends_with_pytest_however_that_ends(
    pytester: pytest.Pytester, tiny_folder: Path
) -> None:
    pytester.makepyfile(USE + "\ndef test_long(noted):\n    time.sleep(60)\n")
    command = [sys.executable, "-m", "pytest", f"--elastic-moe-model={tiny_folder}"]
    with subprocess.Popen(command, cwd=pytester.path, stdout=subprocess.DEVNULL) as process:
        try:
            until = time.monotonic() + 60
            while not (pytester.path / "noted").exists() or not noted(pytester):
                assert time.monotonic() < until
                time.sleep(0.02)
            (pid,) = noted(pytester)
            assert alive(pid)
        finally:
            process.kill()
    assert gone(pid, 10)


def test_one_ends_when_it_is_told_to_another_by_force(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keys are new each time, and can be read nowhere."""
    with start_server(str(tiny_folder)) as one:
        command = Path(f"/proc/{one.pid}/cmdline").read_text()
        reported = command + repr(one) + one.log()
        keys = {one.api_key, one.admin_key}
        assert len(keys) == 2
        assert not any(key in reported for key in keys)
        assert one.healthy
        monkeypatch.setattr("elastic_moe.testing.process.END_SECONDS", 20)
    assert not alive(one.pid)
    with start_server(str(tiny_folder)) as other:
        assert not keys & {other.api_key, other.admin_key}
        os.kill(other.pid, signal.SIGSTOP)  # it hears nothing more
        monkeypatch.setattr("elastic_moe.testing.process.END_SECONDS", 0.1)
    assert not alive(other.pid)
