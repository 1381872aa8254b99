"""pytest fixtures: a real server for the client under test, with fault injection.

    elastic_moe_server   the server, one per session (and per worker of pytest-xdist)
    openai_env           OPENAI_BASE_URL and OPENAI_API_KEY point to it while the test runs
    elastic_moe_faults   fault injection, cleared when the test ends

`elastic_moe.testing.assert_resilient` tests how a client handles faults. Tests that use none of
these start no server, and load next to nothing.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from elastic_moe.testing import ElasticMoEServer, Faults

_SERVER = pytest.StashKey["ElasticMoEServer"]()  # of the session's config, while it runs
OPTIONS = {  # --elastic-moe-NAME and the ini key elastic_moe_NAME -> default, metavar, help
    "model": ("elastic-mini", "MODEL", "a bundled model, or a Hugging Face folder or id"),
    "routing": ("", "NAME", "sub-network of requests that ask for none, such as L24-k2"),
    "isa": (
        "",
        "LEVEL",
        "a level of `elastic-moe info`; texts agree between machines on one",
    ),
    "dtype": ("", "DTYPE", "float32 or bfloat16"),
    "seed": ("", "N", "seed of requests that have none; otherwise answers vary from run to run"),
    "alias": ("", "NAMES", "more names of the model, separated by commas"),
    "api-key": ("", "KEY", "key that requests need (default: a random one)"),
    "args": ("", "ARGS", "more arguments of `elastic-moe serve`"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options, each on the command line and in the ini file."""
    group = parser.getgroup("elastic-moe", "a model server for tests (elastic-moe)")
    for name, (default, metavar, text) in OPTIONS.items():
        help_text = f"{text} (default: {default})" if default else text
        group.addoption(f"--elastic-moe-{name}", metavar=metavar, help=help_text)
        parser.addini(_ini(name), f"the same as --elastic-moe-{name}", default=default)


@pytest.fixture(scope="session")
def elastic_moe_server(pytestconfig: pytest.Config) -> Iterator[ElasticMoEServer]:
    """A server on a free port of 127.0.0.1, ready to answer; see `ElasticMoEServer`."""
    from elastic_moe.errors import ServerError
    from elastic_moe.testing import start_server

    def option(name: str) -> str:
        given = pytestconfig.getoption(f"--elastic-moe-{name}")
        return str(pytestconfig.getini(_ini(name)) if given is None else given)

    seed = option("seed")
    if seed and not re.fullmatch(r"[+-]?[0-9]+", seed):
        pytest.fail(f"{_ini('seed')} must be an integer, got {seed!r}.", pytrace=False)
    here = pytestconfig.getoption("--elastic-moe-model") is not None  # on the command line
    starting = start_server(
        option("model"),
        routing=option("routing"),
        dtype=option("dtype"),
        isa=option("isa"),
        seed=int(seed) if seed else None,
        aliases=[alias.strip() for alias in option("alias").split(",") if alias.strip()],
        api_key=option("api-key"),
        arguments=shlex.split(option("args")),
        folder=pytestconfig.invocation_params.dir if here else pytestconfig.rootpath,
    )
    with ExitStack() as stack:
        failure = ""
        try:
            server = stack.enter_context(starting)
        except ServerError as error:
            failure = str(error)
        if failure:  # outside `except`: pytest would print both errors
            pytest.fail(failure, pytrace=False)
        pytestconfig.stash[_SERVER] = server
        stack.callback(pytestconfig.stash.__delitem__, _SERVER)
        yield server


@pytest.fixture
def openai_env(
    elastic_moe_server: ElasticMoEServer, monkeypatch: pytest.MonkeyPatch
) -> ElasticMoEServer:
    """The server; while the test runs, `openai.OpenAI()` talks to it.

    Sets OPENAI_BASE_URL and OPENAI_API_KEY, and what other programs read: OPENAI_API_BASE, the
    older name, and OPENAI_MODEL. Unsets the organisation and project of an account. Keeps a proxy
    of the environment from standing between.
    """
    settings = {
        "OPENAI_BASE_URL": elastic_moe_server.base_url,
        "OPENAI_API_BASE": elastic_moe_server.base_url,
        "OPENAI_API_KEY": elastic_moe_server.api_key,
        "OPENAI_MODEL": elastic_moe_server.model,
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NO_PROXY", "no_proxy"):
        others = os.environ.get(name)
        monkeypatch.setenv(name, f"{others},127.0.0.1" if others else "127.0.0.1")
    return elastic_moe_server


@pytest.fixture
def elastic_moe_faults(elastic_moe_server: ElasticMoEServer) -> Iterator[Faults]:
    """Fault injection: `elastic_moe_faults.add(error=429, retry_after=1, count=2)`."""
    with elastic_moe_server.faults as faults:
        yield faults


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Start `server.requests` anew for each test."""
    server = item.config.stash.get(_SERVER, None)
    if server is not None:
        with _server_errors(item) as errors:
            server.mark()
        if errors:
            pytest.fail(errors[0], pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the requests of a failed test to its report."""
    report = yield
    server = item.config.stash.get(_SERVER, None)
    if server is not None and report.failed:
        from elastic_moe.testing.records import report as lines_of

        with _server_errors(item) as errors:
            if records := server.requests:
                report.sections.append(("elastic-moe requests", lines_of(records)))
        report.sections += [
            ("elastic-moe server", text) for text in errors if text not in report.longreprtext
        ]
    return report


@contextmanager
def _server_errors(item: pytest.Item) -> Iterator[list[str]]:
    """Collects errors of the server in a list, if the test uses the server; else drops them."""
    from elastic_moe.errors import ServerError

    errors: list[str] = []
    try:
        yield errors
    except ServerError as error:
        if "elastic_moe_server" in getattr(item, "fixturenames", ()):
            errors.append(str(error))


def _ini(name: str) -> str:
    return f"elastic_moe_{name.replace('-', '_')}"
