"""/admin/profiles, /admin/faults and /admin/requests. They need an admin key."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI, Header, Query, Response

from elastic_moe.errors import ProfileNotFoundError
from elastic_moe.protocol.admin.faults import FaultPlan, FaultState
from elastic_moe.protocol.admin.profiles import NamedProfile, Profile, ProfileList
from elastic_moe.protocol.admin.requests import RequestRecords
from elastic_moe.protocol.errors import ErrorResponse
from elastic_moe.server.errors import ApiError, as_api_error
from elastic_moe.server.etags import check_match, etag
from elastic_moe.server.middleware.fault_selection import FaultSelector
from elastic_moe.server.service import Service

IfMatch = Annotated[str | None, Header()]
Number = Annotated[int, Query(ge=0)]
# Errors of changing endpoints, beside those of all endpoints.
_STALE: dict[int | str, dict[str, Any]] = {
    412: {"model": ErrorResponse, "description": "somebody else changed it meanwhile"}
}
_NO_FILE: dict[int | str, dict[str, Any]] = {
    409: {"model": ErrorResponse, "description": "there is no file that profiles are kept in"}
}


def add_endpoints(app: FastAPI, service: Service) -> None:
    """Add the endpoints of this module to the application."""
    _add_profiles(app, service)
    _add_faults(app, service)
    _add_requests(app, service)


def _add_profiles(app: FastAPI, service: Service) -> None:
    profiles = service.routing.profiles

    @app.get("/admin/profiles")
    async def list_profiles() -> ProfileList:
        """All profiles."""
        named = [NamedProfile(name=n, profile=p) for n, p in profiles.all().items()]
        return ProfileList(profiles=named)

    @app.get("/admin/profiles/{name}")
    async def get_profile(name: str, response: Response) -> Profile:
        """One of them, with its ETag."""
        try:
            profile = profiles.get(name)
        except ProfileNotFoundError as error:
            raise as_api_error(error, status=404) from None
        response.headers["etag"] = etag(profile)
        return profile

    @app.put(
        "/admin/profiles/{name}",
        responses={201: {"model": Profile, "description": "it was made"}, **_STALE, **_NO_FILE},
    )
    def put_profile(
        name: str,
        profile: Profile,
        response: Response,
        if_match: IfMatch = None,
        if_none_match: IfMatch = None,
    ) -> Profile:
        """Create or replace a profile, here and in the file of --profiles.

        With If-Match, only if nobody else has changed it meanwhile.
        """
        if if_none_match is not None and if_none_match.strip() != "*":
            raise ApiError(400, "If-None-Match must be * here.", param="if-none-match")
        if profiles.put(name, profile, if_match, if_none_match):
            response.status_code = 201
        response.headers["etag"] = etag(profile)
        return profile

    @app.delete("/admin/profiles/{name}", status_code=204, responses={**_STALE, **_NO_FILE})
    def delete_profile(name: str, if_match: IfMatch = None) -> None:
        """Delete a profile."""
        try:
            profiles.delete(name, if_match)
        except ProfileNotFoundError as error:
            raise as_api_error(error, status=404) from None


def _add_faults(app: FastAPI, service: Service) -> None:
    @app.get("/admin/faults")
    async def get_faults(response: Response) -> FaultState:
        """The plan of fault injection, and how often each rule applied."""
        faults = _faults(service)
        response.headers["etag"] = etag(faults.plan)
        return faults.state()

    @app.put("/admin/faults", responses=_STALE)
    async def put_faults(
        plan: FaultPlan, response: Response, if_match: IfMatch = None
    ) -> FaultState:
        """Replace the whole plan; all counts restart at 0."""
        faults = _faults(service)
        check_match(etag(faults.plan), if_match, None)
        faults.set(plan)
        response.headers["etag"] = etag(plan)
        return faults.state()

    @app.delete("/admin/faults", status_code=204, responses=_STALE)
    async def delete_faults(if_match: IfMatch = None) -> None:
        """Inject no more faults."""
        faults = _faults(service)
        check_match(etag(faults.plan), if_match, None)
        faults.set(FaultPlan())


def _add_requests(app: FastAPI, service: Service) -> None:
    @app.get("/admin/requests")
    async def get_requests(after: Number = 0) -> RequestRecords:
        """The requests below /v1/ after this number, with their bodies; kept in memory only."""
        _faults(service)
        history = service.requests
        return RequestRecords(requests=history.after(after), dropped=history.dropped)

    @app.delete("/admin/requests", status_code=204)
    async def delete_requests() -> None:
        """Delete all of them."""
        _faults(service)
        service.requests.clear()


def _faults(service: Service) -> FaultSelector:
    if service.faults is None:
        raise ApiError(
            404, "faults are injected by a server that was started with --inject.", code="no_inject"
        )
    return service.faults
