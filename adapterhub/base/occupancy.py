"""How many requests an engine has, whose they are, and of which adapters. Any thread may ask, and count.

So many may wait or run whoever they are from. Some places beyond that are for owners who have fewer requests than there
are places left: one who fills the queue keeps nobody else out of it.

Source of that rule: Choudhury and Hahne, "Dynamic Queue Length Thresholds for Shared-Memory Packet Switches" (1998).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable

from adapterhub.base.request import Request
from adapterhub.errors import TooManyRequests

_RESERVE = 8  # one place more for so many


class Occupancy:
    def __init__(self, most: int) -> None:
        """`most` requests of anybody's."""
        self._most = most
        self._places = most - (-most // _RESERVE)
        self._requests = 0  # that have not ended
        self._owners: Counter[str] = Counter()  # whose they are
        self._wanted: Counter[str] = Counter()  # the digests of their adapters
        self._counting = threading.Lock()

    @property
    def requests(self) -> int:
        return self._requests

    def wants(self, digest: str) -> bool:
        """Whether one of the requests is for this adapter."""
        return self._wanted[digest] > 0

    def enter(self, request: Request) -> None:
        """A request more. Raises TooManyRequests when its owner may have no more."""
        with self._counting:
            left = self._places - self._requests
            if self._requests >= self._most and self._owners[request.owner] >= left:
                raise TooManyRequests("Too many requests are waiting or running. Try again in a second.")
            self._requests += 1
            self._owners[request.owner] += 1
            if request.adapter is not None:
                self._wanted[request.adapter.digest] += 1

    def leave(self, requests: Iterable[Request]) -> None:
        """They have ended."""
        with self._counting:
            for request in requests:
                self._requests -= 1
                _take(self._owners, request.owner)
                if request.adapter is not None:
                    _take(self._wanted, request.adapter.digest)


def _take(counter: Counter[str], key: str) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
