"""Writes to disk, off the thread that hears the news: one after the other for each job, side by side for several."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

log = logging.getLogger(__name__)


class Lanes:
    """Safe to use from any thread. What is added to a lane deals with its own errors."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="adapterhub-job-writes")
        self._lock = threading.Lock()
        self._waiting: dict[str, deque[Callable[[], None]]] = {}  # of the lanes that are at work

    def add(self, lane: str, action: Callable[[], None]) -> None:
        """After what was added to this lane before."""
        with self._lock:
            if lane in self._waiting:
                self._waiting[lane].append(action)
                return
            self._waiting[lane] = deque([action])
        self._pool.submit(self._run, lane)

    def close(self) -> None:
        """Returns when all that was added is done."""
        self._pool.shutdown()

    def _run(self, lane: str) -> None:
        while True:
            with self._lock:
                if not self._waiting[lane]:
                    del self._waiting[lane]
                    return
                action = self._waiting[lane].popleft()
            try:
                action()
            except Exception:
                log.exception("a write for %s failed", lane)
