"""What other threads want of the engine's: actions in a queue, which it carries out between two steps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import TypeVar

from adapterhub.errors import Unavailable

Result = TypeVar("Result")


class Inbox:
    """What is posted before the end is carried out; what comes after is refused."""

    def __init__(self) -> None:
        self._actions: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._ending = threading.Lock()
        self._ended = False

    # -- for any thread

    @property
    def ended(self) -> bool:
        return self._ended

    def put(self, action: Callable[[], None]) -> None:
        """For what nobody waits for: after the end it is forgotten."""
        self._actions.put(action)

    def post(self, action: Callable[[], None]) -> None:
        """For what somebody waits for. Raises Unavailable after the end."""
        with self._ending:
            if self._ended:
                raise shutting_down()
            self._actions.put(action)

    def ask(self, question: Callable[[], Result]) -> Future[Result]:
        """The answer, or the error, of `question` on the engine's thread. Raises Unavailable after the end."""
        future: Future[Result] = Future()

        def answer() -> None:
            try:
                future.set_result(question())
            except BaseException as error:
                future.set_exception(error)

        self.post(answer)
        return future

    @property
    def waiting(self) -> bool:
        """Something is to be carried out."""
        return not self._actions.empty()

    # -- the engine's thread

    def wait(self, seconds: float | None) -> None:
        """Carries out the next action as soon as there is one; returns after that time without one."""
        try:
            action = self._actions.get(timeout=seconds)
        except Empty:
            return
        action()

    def carry_out(self) -> None:
        """All that has come."""
        while True:
            try:
                action = self._actions.get_nowait()
            except Empty:
                return
            action()

    def close(self) -> None:
        """The end, after what has come."""
        with self._ending:
            self._ended = True
        self.carry_out()


def shutting_down() -> Unavailable:
    return Unavailable("The server is shutting down; try again.")
