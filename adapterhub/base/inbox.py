"""What other threads want of the engine's: actions in a queue, which it carries out between two steps."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from adapterhub.base.lost import DeviceLost
from adapterhub.errors import Unavailable

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class Inbox:
    """What is posted before the end is carried out; what comes after is refused. No answer that was promised stays out:
    those that are not there at the end fail."""

    def __init__(self) -> None:
        self._actions: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._ending = threading.Lock()
        self._ended: Unavailable | None = None  # why
        self._promised: set[Future[Any]] = set()  # that are not done

    # -- for any thread

    @property
    def ended(self) -> bool:
        return self._ended is not None

    def put(self, action: Callable[[], None]) -> None:
        """For what nobody waits for: after the end it is forgotten."""
        self._actions.put(action)

    def post(self, action: Callable[[], None]) -> None:
        """For what somebody waits for. Raises Unavailable after the end."""
        with self._ending:
            self.check_open()
            self._actions.put(action)

    def check_open(self) -> None:
        """Raises Unavailable after the end."""
        if self._ended is not None:
            raise Unavailable(self._ended.message)

    def ask(self, question: Callable[[], Result]) -> Future[Result]:
        """The answer, or the error, of `question` on the engine's thread. Raises Unavailable after the end."""
        future: Future[Result] = Future()

        def answer() -> None:
            if future.done():  # the end came first
                return
            try:
                future.set_result(question())
            except BaseException as error:
                future.set_exception(error)

        self.promise(future, answer)
        return future

    def promise(self, future: Future[Any], action: Callable[[], None]) -> None:
        """`action`, or something that it begins, completes `future`, unless the end comes first, of which it has to
        take care. Raises Unavailable after the end."""
        self._promised.add(future)
        future.add_done_callback(self._promised.discard)
        self.post(action)

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

    def close(self, why: Unavailable) -> None:
        """The end, after what has come; `why` is what those are told who come later."""
        with self._ending:
            self._ended = why
        self.carry_out()
        self._break_promises(why)

    def lose(self, why: Unavailable) -> None:
        """The end, because of `why`: what has come is noted, as far as that is possible, and not answered."""
        with self._ending:
            self._ended = why
        self._break_promises(why)
        while self.waiting:
            try:
                self._actions.get_nowait()()
            except (Exception, DeviceLost) as error:
                log.warning("something that was asked for was lost with the device: %s", error)

    def _break_promises(self, why: Unavailable) -> None:
        for future in list(self._promised):
            future.set_exception(Unavailable(why.message))


def shutting_down() -> Unavailable:
    return Unavailable("The server is shutting down; try again.")
