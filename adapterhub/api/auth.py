"""Who a caller is, by their API key, and what the key may do: each route depends on one of the callers below."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated

from fastapi import Depends, Request

from adapterhub.api.loopback import check_local
from adapterhub.api.tenancy.keys import State
from adapterhub.api.tenancy.terms import Scope
from adapterhub.errors import Forbidden, Unauthorized


@dataclass(frozen=True)
class Principal:
    """On whose behalf a request is made, and with which key, by its id."""

    owner: str
    key: str
    project: str
    scopes: frozenset[Scope]

    @property
    def admin(self) -> bool:
        return Scope.ADMIN in self.scopes


def principal(request: Request) -> Principal:
    """The caller, whatever their key may do. Raises Unauthorized, saying what is wrong with the key."""
    hub = request.app.state.hub
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    if hub.config.no_auth:
        check_local(request.headers)
        scheme, secret = "bearer", hub.operators_key
    if scheme.lower() != "bearer" or not secret.strip():
        raise Unauthorized(
            "No API key was sent. Send one as 'Authorization: Bearer KEY'; the operator makes one with "
            "`adapterhub keys create OWNER`.",
            code="missing_api_key",
        )
    key = hub.keys.find(secret.strip())
    if key is None:
        raise Unauthorized("This API key is not valid. Ask the operator for a new one.")
    if key.state is State.REVOKED:
        raise Unauthorized("This API key was revoked. Ask the operator for a new one.", code="api_key_revoked")
    if key.state is State.EXPIRED:
        when = datetime.fromtimestamp(key.expires_at or 0, UTC)
        raise Unauthorized(
            f"This API key expired at {when:%Y-%m-%d %H:%M:%S} UTC. Ask the operator for a new one.",
            code="api_key_expired",
        )
    if hub.keys.note_use(key):
        hub.expect(key.owner)
    return Principal(key.owner, key.id, key.project, key.scopes)


class Needs:
    """A dependency: the caller, whose key has one of the scopes. On the event loop: it costs less than a thread."""

    def __init__(self, *scopes: Scope) -> None:
        self.scopes = scopes

    async def __call__(self, request: Request) -> Principal:
        """Raises Unauthorized and Forbidden."""
        caller = principal(request)
        if caller.scopes.isdisjoint(self.scopes):
            if self.scopes == (Scope.ADMIN,):
                raise Forbidden("This needs an admin key (`adapterhub keys create OWNER --admin`).")
            raise Forbidden(
                f"This needs a key with the scope {' or '.join(self.scopes)}; this one has "
                f"{', '.join(sorted(caller.scopes))} (`adapterhub keys create OWNER --scope ...`)."
            )
        return caller


class Changes(Needs):
    """As `Needs`; the request is known to be under way until it has been answered, so that whoever erases the owner
    can wait for what it still writes."""

    async def __call__(self, request: Request) -> AsyncIterator[Principal]:  # type: ignore[override]
        caller = await super().__call__(request)
        with request.app.state.hub.changes.on_behalf(caller.owner):
            yield caller


Caller = Annotated[Principal, Depends(Needs(Scope.READ))]
Inferring = Annotated[Principal, Depends(Needs(Scope.INFER))]
Choosing = Annotated[Principal, Depends(Needs(Scope.READ, Scope.INFER))]  # looks which models there are
Training = Annotated[Principal, Depends(Changes(Scope.TRAIN))]
Admin = Annotated[Principal, Depends(Needs(Scope.ADMIN))]
