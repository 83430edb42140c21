"""Whether the server is alive, and whether it should be sent requests. Anybody may ask."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from adapterhub.api.hub import TheHub

router = APIRouter(include_in_schema=False)


@router.get("/healthz")
async def healthz(hub: TheHub) -> JSONResponse:
    """Liveness: 503 when only a restart helps; not for one of several devices, as a restart would end the others'
    answers."""
    return _state("ok" if hub.engine.alive else "engine down", hub.engine.alive)


@router.get("/readyz")
async def readyz(hub: TheHub, request: Request) -> JSONResponse:
    """Readiness: 503 also while the server stops. With some devices lost it is degraded, and ready."""
    stopping = request.app.state.gate.closed
    if not hub.engine.alive:
        return _state("engine down", False)
    ready = "degraded" if hub.engine.degraded else "ready"
    return _state("stopping" if stopping else ready, not stopping)


def _state(text: str, good: bool) -> JSONResponse:
    return JSONResponse({"status": text}, 200 if good else 503)
