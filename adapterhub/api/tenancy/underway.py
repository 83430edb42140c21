"""Answers that are under way, by the key that asked: when it is revoked, they end."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from adapterhub.api.tenancy.keys import KeyStore
from adapterhub.errors import HubError, Unauthorized

log = logging.getLogger(__name__)
_SECONDS = 0.5  # a revoked key's answers run on for so long at most
End = Callable[[HubError], None]


class Underway:
    """For the event loop alone."""

    def __init__(self, keys: KeyStore) -> None:
        self._keys = keys
        self._ends: dict[str, set[End]] = {}

    @contextmanager
    def on_behalf(self, key: str, end: End) -> Iterator[None]:
        """While this lasts, `end` is called with the reason once the key, by its id, has been revoked."""
        ends = self._ends.setdefault(key, set())
        ends.add(end)
        try:
            yield
        finally:
            ends.discard(end)
            if not ends and self._ends.get(key) is ends:
                del self._ends[key]

    async def watch(self) -> None:
        """Looks, for as long as the server runs. Another process may revoke keys, so nobody else could tell."""
        while True:
            await asyncio.sleep(_SECONDS)
            try:
                self.look()
            except sqlite3.Error:
                log.exception("whether keys were revoked cannot be told; trying again")

    def look(self) -> None:
        for key in self._keys.ended(self._ends) if self._ends else ():
            for end in self._ends.pop(key):
                end(Unauthorized("The API key of this request was revoked while it ran.", code="api_key_revoked"))
