"""The FastAPI application around a hub: routes, the one error handler, request ids and body limits."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapterhub import __version__
from adapterhub.api import adapters, admin, chat, completions, files, jobs, keys, models, quotas, usage, versions
from adapterhub.api.auth import principal
from adapterhub.api.hub import opened
from adapterhub.base.model import Base
from adapterhub.config import MIB, Config, format_bytes
from adapterhub.errors import (
    BadRequest,
    HubError,
    NotFound,
    ServerFault,
    StorageFull,
    TooLarge,
)

log = logging.getLogger(__name__)
MAX_BODY = 8 * MIB  # of anything that is not an upload
UPLOADS = ("/v1/files", "/v1/adapters")
REQUEST_ID = "adapterhub.request_id"  # in a request's scope


def create_app(config: Config, base: Base) -> FastAPI:
    """The server for one base; its hub opens when the application starts, and closes when it ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with opened(config, base) as hub:
            app.state.hub = hub
            yield

    app = FastAPI(title="AdapterHub", version=__version__, lifespan=lifespan)
    for module in (files, jobs, models, chat, completions, adapters, admin, keys, quotas, usage):
        app.include_router(module.router)
    for router, own in ((versions.looking, versions.own_seen), (versions.router, versions.own_changed)):
        for prefix, whose in (("/v1/adapters", own), ("/admin/adapters", versions.anybodys)):
            app.include_router(router, prefix=prefix, tags=["versions"], dependencies=[Depends(whose)])

    @app.get("/healthz", include_in_schema=False)
    async def healthz() -> JSONResponse:
        alive = app.state.hub.engine.alive
        return JSONResponse({"status": "ok" if alive else "engine down"}, 200 if alive else 503)

    app.add_exception_handler(HubError, _on_hub_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(Exception, _on_bug)
    app.add_middleware(Envelope, max_upload=config.max_file_bytes + MIB)
    return app


def _answer(error: HubError, headers: Mapping[str, str] | None = None) -> Response:
    # in ASCII: a message may quote what no UTF-8 can say, such as half of a surrogate pair
    both = {**error.headers, **(headers or {})}
    return Response(json.dumps(error.body), error.status, both, media_type="application/json")


async def _on_hub_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HubError)
    return _answer(error)


async def _on_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return _answer(BadRequest(f"The body is not valid JSON: {first['ctx']['error']}.", code="invalid_json"))
    # of a field that can be one of several types, what is wrong with the one that fits best
    best = max((e for e in error.errors() if e["loc"][:2] == first["loc"][:2]), key=lambda e: len(e["loc"]))
    where = [str(part) for part in best["loc"][1:]]
    name = ".".join(p for p in where if p not in ("str", "constrained-str") and "[" not in p)[:200]  # less the type
    reason = best["msg"].removeprefix("Value error, ")
    return _answer(BadRequest(f"{name or 'The body'}: {reason}.", param=name or None))


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    cause = error.__cause__  # what happened while the body was read
    if isinstance(cause, HubError):
        return _answer(cause)
    if isinstance(cause, OSError):  # an upload is set aside in a temporary file until it is whole
        log.error("an upload could not be taken in: %s", cause)
        return _answer(StorageFull("The server has no room to take this in. Try again later, or ask the operator."))
    if cause is not None:
        return _answer(BadRequest(f"The body cannot be read: {cause}.", code="invalid_json"))
    if error.status_code == 404:
        return _answer(NotFound(f"There is no {request.method} {request.url.path}.", code="unknown_url"))
    known = BadRequest(f"{error.detail} ({request.method} {request.url.path}).", code="bad_request")
    known.status = error.status_code
    return _answer(known, error.headers)


async def _on_bug(request: Request, error: Exception) -> Response:
    request_id = request.scope[REQUEST_ID]
    log.error("%s %s failed (%s)", request.method, request.url.path, request_id, exc_info=error)
    # this answer is not made within `Envelope`, which has no part in what went wrong
    return _answer(ServerFault("The server met an unexpected error. Its log says more."), {"x-request-id": request_id})


class Envelope:
    """Gives every answer an `x-request-id`, and refuses bodies over the limit while they arrive, and any upload at all
    from those without a key: a body is read before a route looks at who sends it."""

    def __init__(self, app: ASGIApp, max_upload: int) -> None:
        self.app = app
        self.max_upload = max_upload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        is_upload = scope["path"] in UPLOADS
        limit = self.max_upload if is_upload else MAX_BODY
        request_id = scope[REQUEST_ID] = f"req-{secrets.token_hex(12)}"
        received = 0

        async def limited() -> Message:
            nonlocal received
            if is_upload and received == 0:
                principal(Request(scope))
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise TooLarge(f"The request is larger than the {format_bytes(limit)} that are taken here.")
            return message

        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        await self.app(scope, limited, labelled)
