"""Locks by key, which exist only while somebody holds or awaits them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class KeyedLocks:
    """`mutex` guards the table of locks: whoever holds it sees `busy` answers that stay true until they let it go."""

    def __init__(self, mutex: threading.RLock) -> None:
        self._mutex = mutex
        self._locks: dict[str, tuple[threading.RLock, int]] = {}  # and how many hold or await it

    @contextmanager
    def holding(self, key: str) -> Iterator[None]:
        """Only one thread at a time is in this block for `key`; the same one may enter again. Do not enter it with the
        mutex held."""
        with self._mutex:
            lock, users = self._locks.get(key) or (threading.RLock(), 0)
            self._locks[key] = (lock, users + 1)
        try:
            with lock:
                yield
        finally:
            with self._mutex:
                users = self._locks[key][1] - 1
                if users:
                    self._locks[key] = (lock, users)
                else:
                    del self._locks[key]

    def busy(self, key: str) -> bool:
        with self._mutex:
            return key in self._locks
