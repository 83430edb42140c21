"""Threads for what may never return: a read of a disk, or of an object store, that hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class _Task(NamedTuple):
    run: Callable[[], None]
    future: Future


class Threads:
    """Up to `count` threads, started as work comes. Unlike those of an executor, they do not keep a process from ending
    that gave up waiting for them."""

    def __init__(self, count: int, name: str) -> None:
        self.count = count
        self._name = name
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    @property
    def waiting(self) -> int:
        """How much has not begun, as of just now."""
        return self._tasks.qsize()

    def submit(self, act: Callable[[], T]) -> Future[T]:
        """Runs `act` as soon as a thread is free. For one thread to call."""
        future: Future[T] = Future()
        self._tasks.put(_Task(lambda: settle(future, act), future))
        if len(self._threads) < self.count:
            thread = threading.Thread(target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        return future

    def close(self, seconds: float) -> None:
        """Cancels what has not begun, and waits at most so long for what has."""
        while True:
            try:
                task = self._tasks.get_nowait()
            except Empty:
                break
            if task is not None:
                task.future.cancel()
        for _ in self._threads:
            self._tasks.put(None)
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task.run()
            del task  # with what came of it, while it waits for the next


def settle(future: Future[T], act: Callable[[], T]) -> None:
    """Gives the future what `act` returns or raises, unless it was cancelled."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = act()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
