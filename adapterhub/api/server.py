"""The HTTP server around an application: opens it, listens, and when it is told to stop lets requests end first."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from contextlib import AsyncExitStack

import uvicorn
from fastapi import FastAPI

from adapterhub.api.connection import Connection
from adapterhub.errors import BadRequest

log = logging.getLogger(__name__)
_LAST_SECONDS = 5.0  # for answers to say that they were cut off


class Server(uvicorn.Server):
    """Opens and closes the application itself, so that what keeps it from starting ends where all errors do.

    Told to stop, by SIGTERM or SIGINT, it takes no more requests (503; `/readyz` says so too), has jobs save their
    state, and gives answers that are under way `drain_seconds` to end; those that are left then are told why they end.
    A second SIGINT does not wait.
    """

    def __init__(
        self,
        app: FastAPI,
        listener: socket.socket,
        *,
        drain_seconds: float,
        connection: type[Connection] = Connection,
        on_started: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=connection,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_LAST_SECONDS,  # type: ignore[arg-type]  # any number will do
            )
        )
        self._app, self._listener = app, listener
        self._drain_seconds, self._on_started = drain_seconds, on_started
        self._application = AsyncExitStack()

    def serve_forever(self) -> None:
        self.run(sockets=[self._listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self._application.enter_async_context(self._app.router.lifespan_context(self._app))
        await super().startup(sockets)
        if self.started:
            self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._drain()
        await super().shutdown(sockets)
        await self._application.aclose()

    async def _drain(self) -> None:
        hub, gate = self._app.state.hub, self._app.state.gate
        # closing the hub waits for this too, and gives it less time where it waits for the store
        saving = threading.Thread(target=hub.worker.stop, name="adapterhub-saving", daemon=True)
        saving.start()
        log.info("stopping: %d requests are under way", gate.inside)
        if not await gate.empty(self._drain_seconds, lambda: self.force_exit):
            log.warning("stopping: %d requests did not end within %g s", gate.inside, self._drain_seconds)
            hub.cut_off()
            await gate.empty(_LAST_SECONDS, lambda: self.force_exit)


def listen(host: str, port: int) -> socket.socket:
    """A socket of that address, which `Server` listens on. Raises BadRequest when it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only for sockets that say TCP; with it on, a stream's chunks wait 40 ms
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise BadRequest(
            f"Cannot listen on {host}:{port}: {error.strerror}. Choose another --port or --host."
        ) from error
    return listener
