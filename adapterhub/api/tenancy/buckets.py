"""Token buckets that do not drift: so much a minute, with up to a minute's worth at once.

A bucket keeps what is owed: it grows by what is taken, and shrinks by the limit every minute. All of it is in integers,
amounts times the nanoseconds of a minute, so that nothing is lost to rounding however small or many the steps.
"""

from __future__ import annotations

from dataclasses import dataclass

SECOND = 10**9
MINUTE = 60 * SECOND


@dataclass
class Bucket:
    """`owed` of something at the time `at`, in nanoseconds. Times must not go back."""

    at: int
    owed: int = 0  # times MINUTE

    def wait(self, amount: int, limit: int, now: int) -> int:
        """Nanoseconds until `amount` can be taken, which must not be more than the `limit` of a minute."""
        self._drain(limit, now)
        over = self.owed + amount * MINUTE - limit * MINUTE
        return max(0, -(-over // limit))

    def take(self, amount: int, limit: int, now: int) -> None:
        """More than there is, too: then nothing can be taken until that has been paid back. Less than 0 gives back."""
        self._drain(limit, now)
        self.owed = max(0, self.owed + amount * MINUTE)

    def left(self, limit: int, now: int) -> int:
        """How much could be taken now."""
        self._drain(limit, now)
        return max(0, limit * MINUTE - self.owed) // MINUTE

    def until_full(self, limit: int, now: int) -> int:
        """Nanoseconds until all of the limit can be taken, if nothing is until then."""
        self._drain(limit, now)
        return -(-self.owed // limit)

    def _drain(self, limit: int, now: int) -> None:
        self.owed = max(0, self.owed - limit * (now - self.at))
        self.at = now
