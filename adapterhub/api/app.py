"""The FastAPI application around a hub: routes, and the one error handler."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from adapterhub import __version__
from adapterhub.api import (
    adapters,
    admin,
    chat,
    completions,
    files,
    health,
    jobs,
    keys,
    metrics,
    models,
    quotas,
    uploads,
    usage,
    users,
    versions,
)
from adapterhub.api.envelope import Envelope, error_response
from adapterhub.api.gate import Gate
from adapterhub.api.hub import opened
from adapterhub.api.openapi import document
from adapterhub.api.tools import AllowedTools, NamedTool
from adapterhub.base.model import Base
from adapterhub.config import MIB, Config
from adapterhub.errors import (
    BadRequest,
    HubError,
    NotFound,
    StorageFull,
)

log = logging.getLogger(__name__)
# in the place of an error, which of several types a value was taken for
_KINDS = {"str", "constrained-str", NamedTool.__name__, AllowedTools.__name__}
UPLOADS = re.compile("/v1/(files|adapters|uploads/[^/]+/parts)")


def create_app(config: Config, *bases: Base) -> FastAPI:
    """The server for one base, given once for each device; its hub opens when the application starts, and closes when
    it ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with opened(config, *bases) as hub:
            app.state.hub = hub
            yield

    # no pages of documentation: they would run scripts of another site's, next to the keys that people enter there
    # and none of FastAPI's telemetry, which tells paths and bodies
    app = FastAPI(
        title="AdapterHub",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.gate = gate = Gate()
    for module in (files, uploads, jobs, models, chat, completions, adapters, admin, keys, quotas, usage, users):
        app.include_router(module.router)
    for router, own in ((versions.looking, versions.own_seen), (versions.router, versions.own_changed)):
        for prefix, whose in (("/v1/adapters", own), ("/admin/adapters", versions.anybodys)):
            app.include_router(router, prefix=prefix, tags=["versions"], dependencies=[Depends(whose)])

    app.include_router(health.router)
    app.include_router(metrics.router)
    app.openapi = lambda: document(app)  # type: ignore[method-assign]
    app.add_exception_handler(HubError, _on_hub_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_middleware(
        Envelope, gate=gate, max_upload=config.max_file_bytes + MIB, uploads=UPLOADS, body_seconds=config.body_seconds
    )
    return app


async def _on_hub_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HubError)
    return error_response(error)


async def _on_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return error_response(BadRequest(f"The body is not valid JSON: {first['ctx']['error']}.", code="invalid_json"))
    # of a field that can be one of several types, what is wrong with the one that fits best; of equals, what we say
    best = max(
        (e for e in error.errors() if e["loc"][:2] == first["loc"][:2]),
        key=lambda e: (len(e["loc"]), e["type"] == "value_error"),
    )
    where = [str(part) for part in best["loc"][1:]]
    name = ".".join(p for p in where if p not in _KINDS and "[" not in p)[:200]
    reason = best["msg"].removeprefix("Value error, ")
    return error_response(BadRequest(f"{name or 'The body'}: {reason}.", param=name or None))


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    cause = error.__cause__  # what happened while the body was read
    if isinstance(cause, HubError):
        return error_response(cause)
    if isinstance(cause, OSError):  # an upload is set aside in a temporary file until it is whole
        log.error("an upload could not be taken in: %s", cause)
        return error_response(
            StorageFull("The server has no room to take this in. Try again later, or ask the operator.")
        )
    if cause is not None:
        return error_response(BadRequest(f"The body cannot be read: {cause}.", code="invalid_json"))
    if error.status_code == 404:
        return error_response(NotFound(f"There is no {request.method} {request.url.path}.", code="unknown_url"))
    known = BadRequest(f"{error.detail} ({request.method} {request.url.path}).", code="bad_request")
    known.status = error.status_code
    return error_response(known, error.headers)
