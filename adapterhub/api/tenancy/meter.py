"""Counts usage off the way of requests: what is noted is kept in memory, and written down once a second by a thread
of its own, with all else that may be a second late. A `kill -9` loses that second."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence

from adapterhub.api.tenancy.usage import NONE, Counts, Line, Usage, day_of

log = logging.getLogger(__name__)
_SECONDS = 1.0
_STORAGE_SECONDS = 600  # between two counts of what is kept


class Meter:
    """Safe to use from any thread."""

    def __init__(self, usage: Usage, others: Sequence[Callable[[], None]] = ()) -> None:
        """`others` are called every second, too."""
        self._usage = usage
        self._saves = (self.save, self._count_storage, *others)
        self._lock = threading.Lock()
        self._saving = threading.Lock()  # what is being written down is not erased before
        self._erased: set[str] = set()  # keys that are no more
        self._counted: dict[Line, Counts] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="adapterhub-meter", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Writes down what is left."""
        self._stopping.set()
        self._thread.join()
        self._save_all()

    def note(self, owner: str, key: str, adapter: str | None, counts: Counts) -> None:
        """Adds to what is counted. `adapter`: a name; None for the base."""
        line = Line(owner, day_of(time.time()), key, adapter or NONE)
        with self._lock:
            if key in self._erased:
                return
            self._counted[line] = self._counted.get(line, Counts()).plus(counts)

    def released(self, owner: str, adapter: str | None, nbytes: int, created_at: int) -> None:
        """Something that was kept until now is gone: the time since it was last counted is noted."""
        counted = self._usage.storage_counted_until
        seconds = max(0.0, time.time() - max(created_at, counted or created_at))
        self.note(owner, NONE, adapter, Counts(byte_hours=nbytes * seconds / 3600))

    def save(self) -> None:
        """Writes down what was noted, so that it can be asked for."""
        with self._saving:
            self._save()

    def _save(self) -> None:
        with self._lock:
            counted, self._counted = self._counted, {}
        if counted:
            try:
                self._usage.add(counted)
            except BaseException:  # they count the next time
                with self._lock:
                    for line, counts in counted.items():
                        self._counted[line] = self._counted.get(line, Counts()).plus(counts)
                raise
        self._usage.count_training(day_of(time.time()))

    def erase(self, owner: str, keys: Collection[str]) -> int:
        """Removes all that was counted of an owner, and counts nothing more for their `keys`, which are no more;
        returns how many rows that were."""
        with self._lock:
            self._erased |= set(keys)
        with self._saving:
            return self._erase(owner)

    def _erase(self, owner: str) -> int:
        with self._lock:
            self._counted = {line: counts for line, counts in self._counted.items() if line.owner != owner}
        return self._usage.erase(owner)

    def _count_storage(self) -> None:
        counted = self._usage.storage_counted_until
        if counted is None or time.time() - counted >= _STORAGE_SECONDS:
            self._usage.count_storage(int(time.time()))

    def _run(self) -> None:
        while not self._stopping.wait(_SECONDS):
            self._save_all()

    def _save_all(self) -> None:
        for save in self._saves:
            try:
                save()
            except Exception:  # as on a full disk: the next one may do better
                log.exception("usage cannot be written down; trying again")
