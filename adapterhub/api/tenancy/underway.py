"""What is under way: answers, by the key that asked, which end when it is revoked or expires; and changes, by their
owner."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from adapterhub.api.tenancy.keys import KeyStore, State
from adapterhub.errors import HubError, Unauthorized

log = logging.getLogger(__name__)
_SECONDS = 0.5  # an ended key's answers run on for so long at most
End = Callable[[HubError], None]


class Changing:
    """Whose requests that change something are under way. For the event loop alone."""

    def __init__(self) -> None:
        self._owners: Counter[str] = Counter()

    def __contains__(self, owner: str) -> bool:
        return owner in self._owners

    @contextmanager
    def on_behalf(self, owner: str) -> Iterator[None]:
        self._owners[owner] += 1
        try:
            yield
        finally:
            self._owners -= Counter({owner: 1})  # which forgets those who have none left


class Underway:
    """For the event loop alone."""

    def __init__(self, keys: KeyStore) -> None:
        self._keys = keys
        self._ends: dict[str, set[End]] = {}
        self._erased: dict[str, HubError] = {}

    @contextmanager
    def on_behalf(self, key: str, end: End) -> Iterator[None]:
        """While this lasts, `end` is called with the reason once the key, by its id, is good no more.
        Raises what it was erased with."""
        if key in self._erased:
            raise self._erased[key]
        ends = self._ends.setdefault(key, set())
        ends.add(end)
        try:
            yield
        finally:
            ends.discard(end)
            if not ends and self._ends.get(key) is ends:
                del self._ends[key]

    def erase(self, keys: Collection[str], reason: HubError) -> int:
        """Ends what is under way for keys that are no more, and whatever is still to begin for them; returns how many
        answers ended."""
        self._erased |= dict.fromkeys(keys, reason)
        ends = [end for key in keys for end in self._ends.pop(key, ())]
        for end in ends:
            end(reason)
        return len(ends)

    async def watch(self) -> None:
        """Looks, for as long as the server runs: another process may revoke keys, and time ends them."""
        while True:
            await asyncio.sleep(_SECONDS)
            try:
                self.look()
            except sqlite3.Error:
                log.exception("whether keys have ended cannot be told; trying again")

    def look(self) -> None:
        for key, state in self._keys.ended(self._ends).items() if self._ends else ():
            how = "was revoked" if state is State.REVOKED else "expired"
            for end in self._ends.pop(key):
                end(Unauthorized(f"The API key of this request {how} while it ran.", code=f"api_key_{state}"))
