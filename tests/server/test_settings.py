"""Settings that a server refuses to start with."""

from __future__ import annotations

import pytest

from elastic_moe import Engine
from elastic_moe.errors import ServerError
from elastic_moe.server.settings import ServerSettings


def test_settings_that_are_refused() -> None:
    with pytest.raises(ServerError, match="can be reached from other machines"):
        ServerSettings(host="0.0.0.0")
    with pytest.raises(ServerError, match="can be reached from other machines"):
        ServerSettings(host="example.org")
    for fine in ({"api_keys": ("k",)}, {"expose_without_keys": True}):
        assert ServerSettings(host="0.0.0.0", **fine).host == "0.0.0.0"
    for host in ("127.0.0.1", "::1", "[::1]", "localhost", "127.9.9.9"):
        assert ServerSettings(host=host).host == host
    with pytest.raises(ServerError, match="API key 2 must be") as reported:
        ServerSettings(api_keys=("fine", "not fine"))
    assert "not fine" not in str(reported.value)
    with pytest.raises(ServerError, match="without '@'"):
        ServerSettings(aliases=("a@b",))
    with pytest.raises(ServerError, match="port must be"):
        ServerSettings(port=1 << 16)
    for seed in (-(1 << 63) - 1, 1 << 64):
        with pytest.raises(ServerError, match=rf"seed must be in .*, got {seed}\."):
            ServerSettings(seed=seed)
    with pytest.raises(ServerError, match="drain_seconds"):
        ServerSettings(drain_seconds=float("nan"))


def test_a_default_that_the_model_lacks_is_told_at_once(tiny: Engine) -> None:
    from elastic_moe.errors import RoutingError
    from elastic_moe.server.app import create_app

    with pytest.raises(RoutingError, match="got 99"):
        create_app(tiny, ServerSettings(routing="L99"))
