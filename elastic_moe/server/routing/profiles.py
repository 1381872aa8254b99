"""The profiles of a server: built in or from a TOML file, and changed while it runs."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

import tomlkit
from pydantic import ValidationError
from tomlkit.exceptions import ParseError

from elastic_moe.config import RoutingConfig
from elastic_moe.errors import (
    ProfileError,
    ProfileNotFoundError,
    ProfilesFileError,
    RoutingError,
    ServerError,
)
from elastic_moe.files import write_text
from elastic_moe.protocol.admin.profiles import Profile, TopKStep
from elastic_moe.routing import ModelShape, is_name, shorten
from elastic_moe.routing.axes import DEPTH, TOP_K
from elastic_moe.server.etags import check_match, etag

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")


def built_in(shape: ModelShape) -> dict[str, Profile]:
    """The profiles of a server that was given none, in parts of what the model has."""
    layers, k = shape.num_layers, max(1, shape.max_top_k)
    half = ceil(k / 2)
    return {
        "interactive": Profile(
            description="Even speed: half of the experts per token, for every request alike.",
            routing=RoutingConfig().with_value(TOP_K, half),
            pinned=True,
        ),
        "batch": Profile(
            description="Throughput: three quarters of the layers; the longer, the fewer experts.",
            routing=RoutingConfig().with_value(DEPTH, ceil(3 * layers / 4)),
            top_k_by_tokens=[
                TopKStep(up_to=256, top_k=k),
                TopKStep(up_to=1024, top_k=half),
                TopKStep(top_k=ceil(k / 4)),
            ],
        ),
        "prototyping": Profile(
            description="Quick and rough: half of the layers, one expert per token.",
            routing=RoutingConfig().with_value(DEPTH, ceil(layers / 2)).with_value(TOP_K, 1),
        ),
        "deterministic": Profile(
            description="The same request gets the same answer: the whole network, most likely "
            "tokens.",
            pinned=True,
            temperature=0.0,
            seed=0,
            locked=["temperature", "seed"],
        ),
    }


class ProfileBook:
    """Profiles by name; safe from any thread.

    Args:
        path: of the TOML file that they are kept in; None keeps them as they are.
        shape: of the model that runs them.

    Raises:
        ServerError: a profile means nothing for the model.
    """

    def __init__(
        self, profiles: Mapping[str, Profile], path: Path | None, shape: ModelShape
    ) -> None:
        for name, profile in profiles.items():
            try:
                _check_name(name)
                _check_routing(profile, shape)
            except (ProfileError, RoutingError) as error:
                raise ServerError(f"profile {shorten(name)}: {error}") from error
        self._profiles, self._path, self._shape = dict(profiles), path, shape
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path | None, shape: ModelShape) -> ProfileBook:
        """Those of a file, or the built-in ones. A file that does not exist is made with these.

        Raises:
            ServerError: the file cannot be read, or a profile means nothing for the model.
        """
        if path is None:
            return cls(built_in(shape), None, shape)
        if not path.exists():
            book = cls(built_in(shape), path, shape)
            document = tomlkit.document()
            for name, profile in book.all().items():
                document[name] = _plain(profile)
            try:
                write_text(path, tomlkit.dumps(document))
            except OSError as error:
                raise ServerError(f"profiles cannot be written to {path}: {error}") from error
            return book
        found = {}
        for name, table in _read(path).unwrap().items():
            try:
                found[name] = Profile.model_validate(table)
            except ValidationError as error:
                fault = error.errors()[0]
                where = ".".join(map(str, (name, *fault["loc"])))
                raise ServerError(f"{path}: {where}: {fault['msg']}.") from None
        return cls(found, path, shape)

    def all(self) -> dict[str, Profile]:
        """All of them."""
        return dict(self._profiles)

    def __contains__(self, name: str) -> bool:
        return name in self._profiles

    def get(self, name: str) -> Profile:
        """The profile of this name.

        Raises:
            ProfileNotFoundError: there is none.
        """
        profile = self._profiles.get(name)
        if profile is None:
            there = ", ".join(self._profiles) or "none"
            raise ProfileNotFoundError(
                f"the profile {name[:80]!a} does not exist; there are {there}."
            )
        return profile

    def put(
        self,
        name: str,
        profile: Profile,
        if_match: str | None = None,
        if_none_match: str | None = None,
    ) -> bool:
        """Set a profile for all requests from now on, and keep it in the file.

        Returns:
            Whether it is new.

        Raises:
            PreconditionError: somebody else changed it meanwhile.
            ProfilesFileError: there is no file to keep it in.
            ProfileError, RoutingError: the name is none, or the model cannot run it.
        """
        _check_name(name)
        _check_routing(profile, self._shape)
        with self._lock:
            old = self._profiles.get(name)
            check_match(None if old is None else etag(old), if_match, if_none_match)
            self._keep(name, profile)
            self._profiles = {**self._profiles, name: profile}
        return old is None

    def delete(self, name: str, if_match: str | None = None) -> None:
        """Take a profile away.

        Raises:
            PreconditionError, ProfilesFileError: as `put`.
            ProfileNotFoundError: there is none.
        """
        with self._lock:
            check_match(etag(self.get(name)), if_match, None)
            self._keep(name, None)
            self._profiles = {n: p for n, p in self._profiles.items() if n != name}

    def _keep(self, name: str, profile: Profile | None) -> None:
        """Change one table of the file; comments and other tables stay as somebody wrote them."""
        if self._path is None:
            raise ProfilesFileError(
                "profiles are changed in the file of --profiles, and this server was started "
                "without one."
            )
        document = _read(self._path)
        if profile is None:
            document.pop(name, None)
        else:
            document[name] = _plain(profile)
        write_text(self._path, tomlkit.dumps(document))


def _read(path: Path) -> tomlkit.TOMLDocument:
    try:
        return tomlkit.parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ParseError) as error:
        raise ServerError(f"profiles cannot be read from {path}: {error}") from error


def _plain(profile: Profile) -> dict[str, Any]:
    """As TOML has it: what says nothing is left out."""
    return profile.model_dump(exclude_defaults=True, exclude_none=True, by_alias=True)


def _check_routing(profile: Profile, shape: ModelShape) -> None:
    """Raise `RoutingError` unless the model has every sub-network that a profile may mean."""
    for routing in profile.routings:
        routing.resolve(shape)


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ProfileError(
            f"a profile's name must be 1 to 64 letters, digits, '_', '.' or '-', beginning with a "
            f"letter, got {shorten(name)}."
        )
    if is_name(name):
        raise ProfileError(
            f"a profile's name must not be a sub-network's, as both come after '@' in a model's "
            f"name, got {shorten(name)}."
        )
