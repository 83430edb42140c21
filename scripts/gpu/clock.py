"""The time of a run: each section has a share of it, and what may be left out is left out where that is used up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

_LEAST = 20.0  # seconds, with less of which no section begins


class Clock:
    """A section has to end by when it and all before it would have, had each taken its share; so what one does not use,
    later ones may. Only what may be left out is held to that: checks, and a few repetitions of each figure, are not."""

    def __init__(
        self,
        shares: Mapping[str, float],
        limit: float,
        started: float | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`shares` of `limit` seconds, in the order of the sections; the first began when the run `started`."""
        self._now = now
        self._started = now() if started is None else started
        self.limit = limit
        whole, until = sum(shares.values()), 0.0
        self._ends: dict[str, float] = {}
        self._shares = {section: share / whole * limit for section, share in shares.items()}
        for section, seconds in self._shares.items():
            until += seconds
            self._ends[section] = until
        self._end = limit
        self.seconds: dict[str, float] = {}  # that sections took
        self.left_out: list[str] = []

    @property
    def elapsed(self) -> float:
        return self._now() - self._started

    def share(self, section: str) -> float:
        """Seconds."""
        return self._shares.get(section, 0.0)

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        began, self._end = self._now(), self._ends.get(name, self.limit)
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - began

    def may(self, what: str) -> bool:
        """Whether there is time for something that may be left out; if not, it is noted."""
        if self.elapsed < self._end:
            return True
        self.leave_out([what])
        return False

    def leave_out(self, what: Iterable[str]) -> None:
        """Notes what another process has left out."""
        self.left_out += [one for one in what if one not in self.left_out]

    def is_over(self, section: str) -> bool:
        """Whether there is no time for a section of figures at all; if so, it is noted."""
        if self.elapsed + _LEAST <= self.limit:
            return False
        self.leave_out([section])
        return True
