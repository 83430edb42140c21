"""One client's TCP connection, with the limits that uvicorn has none for: how long a request's head may take and how
large it may be, how long an answer may wait for a client that does not read it, and when a silent peer is given up."""

from __future__ import annotations

import asyncio
import http
import json
import secrets
import socket

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from adapterhub.config import format_bytes
from adapterhub.errors import BadRequest, HubError

MAX_HEAD = 64 * 1024  # bytes of a request's line and headers
MAX_CONNECTIONS = 4096
_PROBE_SECONDS, _PROBES = 15, 4  # of a peer that says nothing


class HeadTooLarge(BadRequest):
    status = 431
    code = "headers_too_large"


class Connection(HttpToolsProtocol):
    """For the event loop alone."""

    head_seconds = 20.0  # from the first byte of a request, or from connecting, until its headers are complete
    stall_seconds = 60.0  # that an answer waits for room in the client's window; data nobody acknowledges too

    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _fault: HubError | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
            return
        if (raw := transport.get_extra_info("socket")) is not None and raw.family in (socket.AF_INET, socket.AF_INET6):
            _give_up_silent(raw, self.stall_seconds)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.cycle is None or self.cycle.response_complete:  # blank lines between requests are no life
            self._expect_head()
        super().data_received(data)
        if self._head_timer is not None and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD:
                self._fault = _head_too_large()
                self.send_400_response("")

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._head_bytes += len(name) + len(value)

    def on_headers_complete(self) -> None:
        size, self._head_bytes = self._head_bytes + len(self.url), 0
        if size > MAX_HEAD:
            self._fault = _head_too_large()
            raise self._fault  # the parser ends with an error, and that with `send_400_response`
        super().on_headers_complete()
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def send_400_response(self, msg: str) -> None:
        """Answers what is no request as every error is answered; `msg` is uvicorn's, for what it could not parse."""
        fault = self._fault or BadRequest("This is not a valid HTTP/1.1 request.", code="invalid_http")
        body = json.dumps(fault.body).encode()
        phrase = http.HTTPStatus(fault.status).phrase
        head = (
            f"HTTP/1.1 {fault.status} {phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            f"x-request-id: req-{secrets.token_hex(12)}\r\nx-content-type-options: nosniff\r\nconnection: close\r\n\r\n"
        )
        if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
            self.transport.write(head.encode() + body)
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(self.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_bytes = 0
            self._head_timer = self.loop.call_later(self.head_seconds, self.transport.abort)

    def _stop_timers(self) -> None:
        for timer in (self._head_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._stall_timer = None


def _head_too_large() -> HubError:
    return HeadTooLarge(f"The request's line and headers are larger than the {format_bytes(MAX_HEAD)} taken here.")


def _give_up_silent(raw: socket.socket, seconds: float) -> None:
    """The kernel ends a connection whose peer is gone without a word."""
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", int(seconds)),
        ("TCP_KEEPINTVL", _PROBE_SECONDS),
        ("TCP_KEEPCNT", _PROBES),
        ("TCP_USER_TIMEOUT", int(seconds * 1000)),
    ):
        if (option := getattr(socket, name, None)) is not None:  # not every system has each of them
            raw.setsockopt(socket.IPPROTO_TCP, option, value)
