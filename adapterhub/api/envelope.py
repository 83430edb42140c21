"""What every request passes before a route sees it, and what every answer carries: ids, limits, headers, a log line."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from fastapi import Request, Response
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapterhub.api.auth import principal
from adapterhub.api.gate import Gate, Stopping
from adapterhub.api.logs import ACCESS, of_request
from adapterhub.api.strictjson import check_json
from adapterhub.api.tracing import name_request
from adapterhub.config import MIB, format_bytes
from adapterhub.errors import BadRequest, HubError, ServerFault, TooLarge

log = logging.getLogger(__name__)
MAX_BODY = 8 * MIB  # of anything that is not an upload
REQUEST_ID = "adapterhub.request_id"  # in a request's scope
UNGUARDED = ("/healthz", "/readyz", "/metrics")  # asked about a server that stops, too
_AT_ONCE = 64 * 1024  # bytes of JSON that take a few milliseconds to check, whatever is in them
_SLOWEST = 4096  # bytes of a body that must come each second, after a while
_SECURITY = (
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


class SlowBody(BadRequest):
    status = 408
    code = "request_timeout"

    @property
    def headers(self) -> dict[str, str]:
        return {"connection": "close"}


class UnknownEncoding(BadRequest):
    status = 415
    code = "unsupported_encoding"


def error_response(error: HubError, headers: Mapping[str, str] | None = None) -> Response:
    # in ASCII: a message may quote what no UTF-8 can say, such as half of a surrogate pair
    both = {**error.headers, **(headers or {})}
    return Response(json.dumps(error.body), error.status, both, media_type="application/json")


class Envelope:
    """Refuses bodies over their limit while they arrive, those that arrive too slowly, and any from those without a
    key: a body is read before a route looks at who sends it."""

    def __init__(
        self, app: ASGIApp, gate: Gate, max_upload: int, uploads: re.Pattern[str], body_seconds: float
    ) -> None:
        """`uploads`: the paths that take bodies of up to `max_upload` bytes."""
        self.app = app
        self.gate = gate
        self.max_upload = max_upload
        self.uploads = uploads
        self.body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = scope[REQUEST_ID] = f"req-{secrets.token_hex(12)}"
        started, status = time.perf_counter(), 0
        hub = scope["app"].state.hub

        async def labelled(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = {name.lower() for name, _ in message["headers"]}
                ours = ((name, value) for name, value in _SECURITY if name not in given)
                message["headers"] = [*message["headers"], *ours, (b"x-request-id", request_id.encode())]
            await send(message)

        with of_request(request_id), hub.tracing.request(scope["method"], Headers(scope=scope)) as span:
            try:
                await self._admit(scope, receive, labelled)
            except Exception:
                log.exception("%s %s failed (%s)", scope["method"], _route(scope), request_id)
                if status:  # nothing can be said any more but by hanging up
                    raise
                fault = ServerFault("The server met an unexpected error. Its log says more.")
                await error_response(fault)(scope, receive, labelled)
            finally:
                seconds, route = time.perf_counter() - started, _route(scope)
                name_request(span, scope["method"], route, status, request_id)
                hub.metrics.answered(scope["method"], route, status, seconds)
                _log(scope["method"], route, status, seconds)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in UNGUARDED:
            await self.app(scope, receive, send)
            return
        try:
            with self.gate.passed(), ExitStack() as while_under_way:
                await self.app(scope, self._limited(scope, receive, while_under_way), send)
        except Stopping as error:
            await error_response(error)(scope, receive, send)

    def _limited(self, scope: Scope, receive: Receive, while_under_way: ExitStack) -> Receive:
        headers = Headers(scope=scope)
        is_upload = self.uploads.fullmatch(scope["path"]) is not None
        limit = self.max_upload if is_upload else MAX_BODY
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        is_json = kind == "application/json" or kind.endswith("+json")
        chunks: list[bytes] = []
        begun, received, more = 0.0, 0, True
        arrives: Callable[[int], None] | None = None  # is told what was not announced

        def begin() -> None:
            nonlocal begun, arrives
            caller = principal(Request(scope))
            begun = time.monotonic()
            if (encoding := headers.get("content-encoding", "identity").lower()) != "identity":
                raise UnknownEncoding(f"Bodies are taken as they are, not with Content-Encoding {encoding[:80]!r}.")
            if (announced := headers.get("content-length", "")).isdecimal() and int(announced) > limit:
                raise _too_large(limit)
            if is_upload:
                tell = while_under_way.enter_context(scope["app"].state.hub.room.arriving(caller.owner))
                if announced.isdecimal():
                    tell(int(announced))
                else:
                    arrives = tell

        async def limited() -> Message:
            nonlocal received, more
            if not more:
                return await receive()  # whether the client is still there
            if not begun:
                begin()
            try:
                async with asyncio.timeout(begun + self.body_seconds + received / _SLOWEST - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise SlowBody(f"After {received} bytes of the body, the rest did not come in time.") from None
            body = message.get("body", b"")
            received += len(body)
            more = message.get("more_body", False)
            if received > limit:
                raise _too_large(limit)
            if arrives is not None:
                arrives(len(body))
            if is_json:
                chunks.append(body)
                if not more and received > _AT_ONCE:
                    await asyncio.to_thread(check_json, b"".join(chunks))
                elif not more and received:
                    check_json(b"".join(chunks))
            return message

        return limited


def _too_large(limit: int) -> HubError:
    return TooLarge(f"The request is larger than the {format_bytes(limit)} that are taken here.")


def _route(scope: Scope) -> str | None:
    """The pattern of its path: the path itself may name adapters and owners."""
    return getattr(scope.get("route"), "path", None)


def _log(method: str, route: str | None, status: int, seconds: float) -> None:
    data = {"method": method, "route": route, "status": status, "ms": round(seconds * 1e3, 2)}
    ACCESS.info("%s %s %d", method, route, status, extra={"data": data})
