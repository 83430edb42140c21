"""Which requests are under way, and whether more may come: when the server stops, those that are there end first."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from adapterhub.errors import Unavailable

_LOOK_SECONDS = 0.2


class Stopping(Unavailable):
    code = "server_stopping"

    @property
    def headers(self) -> dict[str, str]:
        return {"retry-after": "5", "connection": "close"}


class Gate:
    """For the event loop alone."""

    def __init__(self) -> None:
        self.closed = False
        self.inside = 0

    @contextmanager
    def passed(self) -> Iterator[None]:
        """One request is under way. Raises Unavailable once the gate is closed."""
        if self.closed:
            raise Stopping("The server is stopping. Try again in a few seconds.")
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    async def empty(self, seconds: float, hurried: Callable[[], bool]) -> bool:
        """Closes it, and waits until nobody is inside, but not for longer, nor once `hurried`. Whether that is so."""
        self.closed = True
        deadline = time.monotonic() + seconds
        while self.inside and not hurried() and time.monotonic() < deadline:
            await asyncio.sleep(min(_LOOK_SECONDS, seconds))
        return not self.inside
