"""Profiles: asked for by name, pinned and locked, changed while the server runs."""

from __future__ import annotations

import re
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.errors import ServerError
from elastic_moe.protocol.admin.profiles import Profile
from elastic_moe.routing.axes import TOP_K
from elastic_moe.server.settings import ServerSettings
from tests.server.conftest import Running

ADMIN = {"authorization": "Bearer admin-key"}
FILE = """# ours
[quick]  # for drafts
description = "rough"
routing = {depth = 2, top_k = 1}

[steps]
routing = {depth = 3}
top_k_by_tokens = [{up_to = 10, top_k = 2}, {top_k = 1}]

[fixed]
pinned = true
routing = {depth = 3}
temperature = 0
seed = 7
locked = ["temperature"]
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profiles") / "profiles.toml"
    path.write_text(FILE)
    return path


@pytest.fixture(scope="module")
def running(start: Any, path: Path) -> Running:
    return start({"profiles": path, "admin_keys": ("admin-key",)})


def put(running: Running, name: str, body: Any, **headers: str) -> Any:
    return running.http.put(f"/admin/profiles/{name}", json=body, headers={**ADMIN, **headers})


def test_a_profile_is_asked_for_in_the_body_or_the_models_name(running: Running) -> None:
    plain = running.complete([5, 6], temperature=0, max_tokens=4, model="tiny@L2-k1")
    by_field = running.complete([5, 6], temperature=0, max_tokens=4, profile="quick")
    by_name = running.complete([5, 6], temperature=0, max_tokens=4, model="tiny@quick")
    assert by_field["routing"].pop("profile") == by_name["routing"].pop("profile") == "quick"
    assert by_field["routing"] == by_name["routing"] == plain["routing"]
    assert by_field["choices"] == by_name["choices"] == plain["choices"]
    both = running.complete([5], max_tokens=1, model="tiny@quick", profile="quick")
    assert both["routing"]["name"] == "L2-k1"
    error = running.refused(400, model="tiny@quick", profile="steps")
    assert error["param"] == "profile"
    error = running.refused(400, profile="none")
    assert error["code"] == "profile_not_found"
    assert "quick, steps, fixed" in error["message"]
    answer = running.post("/v1/embeddings", model="tiny", input="The", profile="quick")
    assert answer.json()["routing"]["name"] == "L2-k1"
    cards = running.http.get("/v1/models").json()["data"]
    assert cards[0]["elastic"]["profiles"][:3] == ["quick", "steps", "fixed"]


def test_a_sub_network_of_its_own_replaces_that_of_a_profile(running: Running) -> None:
    done = running.complete([5], max_tokens=1, profile="quick", routing_config={"top_k": 2})
    assert done["routing"]["name"] == "k2"  # an absent part means the full value
    assert done["routing"]["profile"] == "quick"


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "k"), [(5, 5, 2), (6, 5, 1), (5, 6, 1), (1, 1, 2)]
)
def test_the_experts_per_token_follow_from_the_tokens_of_a_request(
    running: Running, prompt: int, max_tokens: int, k: int
) -> None:
    asked = {"max_tokens": max_tokens, "profile": "steps"}
    assert running.complete([5] * prompt, **asked)["routing"]["top_k"] == k
    several = running.complete([[5], [5] * prompt], **asked)
    assert several["routing"]["top_k"] == k  # of the longest


def test_a_pinned_profile_keeps_its_sub_network(running: Running) -> None:
    asked = {"profile": "fixed", "max_tokens": 1}
    for own in ({"routing_config": {"depth": 2}}, {"model": "tiny@L2"}):
        error = running.refused(400, **asked, **own)
        assert error["code"] == "profile_pinned"
    assert running.complete([5], **asked, model="tiny@L3")["routing"]["name"] == "L3"


def test_a_locked_value_cannot_be_changed_and_others_are_defaults(running: Running) -> None:
    asked: dict[str, Any] = {"profile": "fixed", "max_tokens": 12, "logprobs": 0}
    plain = running.complete([5, 6], model="tiny@L3", temperature=0, max_tokens=12, logprobs=0)
    assert running.complete([5, 6], **asked)["choices"] == plain["choices"]
    assert running.complete([5, 6], **asked, temperature=0)["choices"] == plain["choices"]
    error = running.refused(400, **asked, temperature=0.5)
    assert error["param"] == "temperature"
    hot = {"routing": {"depth": 3}, "seed": 7}
    assert put(running, "seeded", hot).status_code == 201
    asked = {"profile": "seeded", "max_tokens": 12}
    texts = [running.complete([5, 6], **asked, **own)["choices"][0]["text"] for own in ({}, {})]
    assert texts[0] == texts[1]  # the profile's seed, at the usual temperature
    other = running.complete([5, 6], **asked, seed=8)["choices"][0]["text"]
    same = running.complete([5, 6], model="tiny@L3", max_tokens=12, seed=7)["choices"][0]["text"]
    assert other != texts[0] == same
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
    answer = running.post("/v1/chat/completions", **chat, profile="fixed", temperature=1)
    assert answer.status_code == 400


def test_admin_endpoints_want_an_admin_key(running: Running, served: Running) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer none"}):
        answer = running.http.get("/admin/profiles", headers=headers)
        assert answer.status_code == 401
        assert "admin key" in answer.json()["error"]["message"]
    assert running.http.get("/admin/profiles", headers=ADMIN).status_code == 200
    assert running.http.get("/v1/models", headers=ADMIN).status_code == 200  # open to all
    answer = served.http.get("/admin/profiles", headers=ADMIN)  # without admin keys
    assert answer.status_code == 403
    with pytest.raises(ServerError, match="an API key too"):
        ServerSettings(api_keys=("a", "b"), admin_keys=("b",))
    with pytest.raises(ServerError, match="admin key 1 must be"):
        ServerSettings(admin_keys=("a b",))


def test_a_put_profile_holds_at_once_and_is_in_the_file(running: Running, path: Path) -> None:
    made = put(running, "new", {"routing": {"depth": 2}})
    assert made.status_code == 201
    assert running.complete([5], max_tokens=1, model="tiny@new")["routing"]["name"] == "L2"
    got = running.http.get("/admin/profiles/new", headers=ADMIN)
    assert got.headers["etag"] == made.headers["etag"]
    changed = put(running, "new", {"routing": {"depth": 1}}, **{"if-match": got.headers["etag"]})
    assert changed.status_code == 200
    assert running.complete([5], max_tokens=1, model="tiny@new")["routing"]["name"] == "L1"
    text = path.read_text()
    assert tomllib.loads(text)["new"] == {"routing": {"depth": 1}}
    assert text.startswith("# ours\n[quick]  # for drafts\n")  # as somebody wrote it
    assert not list(path.parent.glob("*.part"))
    gone = running.http.delete("/admin/profiles/new", headers=ADMIN)
    assert gone.status_code == 204
    assert "new" not in tomllib.loads(path.read_text())
    assert running.http.get("/admin/profiles/new", headers=ADMIN).status_code == 404


def test_a_change_to_another_state_than_was_seen_is_refused(running: Running) -> None:
    tag = put(running, "shared", {"routing": {"depth": 1}}).headers["etag"]
    wins = put(running, "shared", {"routing": {"depth": 2}}, **{"if-match": tag})
    late = put(running, "shared", {"routing": {"depth": 3}}, **{"if-match": tag})
    assert (wins.status_code, late.status_code) == (200, 412)
    assert wins.headers["etag"] in late.json()["error"]["message"]
    assert put(running, "shared", {}, **{"if-none-match": "*"}).status_code == 412
    assert put(running, "absent", {}, **{"if-match": "*"}).status_code == 412
    stale = running.http.delete("/admin/profiles/shared", headers={**ADMIN, "if-match": tag})
    assert stale.status_code == 412
    got = running.http.get("/admin/profiles/shared", headers=ADMIN).json()
    assert got["routing"]["depth"] == 2


def test_of_many_who_change_the_same_state_one_wins(running: Running, path: Path) -> None:
    tag = put(running, "raced", {"routing": {"depth": 1}}).headers["etag"]
    codes: list[int] = []

    def change(k: int) -> None:
        body = {"description": str(k)}
        codes.append(put(running, "raced", body, **{"if-match": tag}).status_code)

    threads = [threading.Thread(target=change, args=[k]) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) == [200] + [412] * 7
    kept = running.http.get("/admin/profiles/raced", headers=ADMIN).json()["description"]
    assert tomllib.loads(path.read_text())["raced"] == {"description": kept}


@pytest.mark.parametrize(
    ("name", "body", "reported"),
    [
        ("p", {"routing": {"depth": 99}}, "depth must be an integer in"),
        ("p", {"routing": {"top_k": 99}}, "top_k must be"),
        ("p", {"top_k_by_tokens": [{"top_k": 99}]}, "top_k must be"),
        ("p", {"rooting": {}}, "unknown key"),
        ("p", {"locked": ["seed"]}, "seed is locked, but the profile does not say it"),
        ("p", {"routing": {"top_k": 1}, "top_k_by_tokens": [{"top_k": 1}]}, "keep one"),
        ("p", {"top_k_by_tokens": [{"up_to": 5, "top_k": 1}]}, "up_to must ascend"),
        ("p", {"top_k_by_tokens": [{"top_k": 1}, {"top_k": 1}]}, "up_to must ascend"),
        ("L2-k1", {}, "must not be a sub-network's"),
        ("full", {}, "must not be a sub-network's"),
        ("9", {}, "name must be"),
    ],
)
def test_a_profile_that_means_nothing_is_refused(
    running: Running, path: Path, name: str, body: Any, reported: str
) -> None:
    before = path.read_bytes()
    answer = put(running, name, body)
    assert answer.status_code == 400
    assert reported in answer.json()["error"]["message"]
    assert path.read_bytes() == before


def test_without_a_file_there_are_built_in_profiles_that_cannot_be_changed(start: Any) -> None:
    running = start({"admin_keys": ("admin-key",)})
    listed = running.http.get("/admin/profiles", headers=ADMIN).json()["profiles"]
    names = [profile["name"] for profile in listed]
    assert names == ["interactive", "batch", "prototyping", "deterministic"]
    for name in names:
        done = running.complete([5, 6], max_tokens=3, profile=name)
        assert done["routing"]["profile"] == name
    ks = [
        running.complete([5] * n, max_tokens=1, profile=name)["routing"]["top_k"]
        for name, n in (("interactive", 2), ("interactive", 400), ("batch", 2), ("batch", 400))
    ]
    assert ks[0] == ks[1]
    assert ks[2] > ks[3]
    texts = {running.complete([5], max_tokens=9, profile="deterministic")["choices"][0]["text"]}
    texts.add(running.complete([5], max_tokens=9, temperature=0)["choices"][0]["text"])
    assert len(texts) == 1
    answer = put(running, "own", {})
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "no_profiles_file"


def test_a_file_that_does_not_exist_is_made_with_the_built_in_profiles(
    start: Any, tmp_path: Path
) -> None:
    path = tmp_path / "made.toml"
    first = start({"profiles": path, "admin_keys": ("admin-key",)})
    assert list(tomllib.loads(path.read_text())) == [
        "interactive",
        "batch",
        "prototyping",
        "deterministic",
    ]
    again = start({"profiles": path, "admin_keys": ("admin-key",)})
    both = [r.http.get("/admin/profiles", headers=ADMIN).json() for r in (first, again)]
    assert both[0] == both[1]


@pytest.mark.parametrize(
    ("text", "reported"),
    [
        ("a = 1", "a: Input should be"),
        ("[a]\nx = 1", "a.x"),
        ("[a", "cannot be read"),
        ("[k2]", "must not be a sub-network's"),
        ("[a]\nrouting = {depth = 99}", "profile 'a': depth must be an integer in"),
    ],
)
def test_a_bad_file_is_told_at_the_start(
    start: Any, tmp_path: Path, text: str, reported: str
) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ServerError) as caught:
        start({"profiles": path})
    assert reported in str(caught.value)


def test_the_documented_profile_means_something() -> None:
    text = (Path(__file__).parents[3] / "docs" / "server.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```toml\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    ((name, table),) = tomllib.loads(block).items()
    profile = Profile.model_validate(table)
    assert name == "drafts"
    assert profile.pinned
    assert [profile.routing_for(n).value(TOP_K) for n in (512, 513)] == [4, 2]
