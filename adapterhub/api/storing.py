"""What requests ask of the object store, in threads of its own: a store that hangs takes none of the threads that
answer everything else, and after so many who wait for it the next ones are told."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TypeVar

from adapterhub.swap.store import StoreUnavailable
from adapterhub.swap.threads import Threads

T = TypeVar("T")
THREADS = 8  # they wait for a network, not for a core
MAX_WAITING = 64
PATIENCE_SECONDS = 30.0  # for one of the threads


class Storing:
    """For the event loop alone."""

    def __init__(self) -> None:
        self._threads = Threads(THREADS, "adapterhub-storing")

    async def run(self, act: Callable[[], T]) -> T:
        """What `act` returns or raises, in one of the threads. Raises StoreUnavailable, and `act` is not called, when
        all of them have been busy for too long, or too many wait for one."""
        if self._threads.waiting >= MAX_WAITING:
            raise _busy()
        return await self._run(act, PATIENCE_SECONDS)

    async def iterate(self, pieces: Iterator[T]) -> AsyncIterator[T]:
        """The pieces, each of which may have to come from the store, and waits for a thread for as long as it takes: an
        answer that has begun cannot become an error."""
        while piece := await self._run(lambda: [*_next(pieces)], None):
            yield piece[0]

    def close(self, seconds: float) -> None:
        """What has not begun fails; waits at most so long for what has. From any thread, once nothing is asked."""
        self._threads.close(seconds)

    async def _run(self, act: Callable[[], T], patience: float | None) -> T:
        context = contextvars.copy_context()  # with the request's id, for logs
        task = self._threads.submit(lambda: context.run(act))
        result = asyncio.wrap_future(task)
        try:
            done, _ = await asyncio.wait({result}, timeout=patience)
            if not done and task.cancel():  # it has not begun
                raise _busy()
            return await result
        finally:
            result.cancel()


def _next(pieces: Iterator[T]) -> Iterator[T]:
    for piece in pieces:
        yield piece
        return


def _busy() -> StoreUnavailable:
    return StoreUnavailable(
        "The object store that keeps this server's adapters is slow or does not answer, and others wait for it "
        "already. Nothing was changed. Try again in a while; if it goes on, tell the operator."
    )
