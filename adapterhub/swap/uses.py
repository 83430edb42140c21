"""How each version has been used since the server started.

By version and not by block: several versions of an owner may have the very same one.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from adapterhub.swap.ref import Tier, Use


class Used(NamedTuple):
    """`hits`: requests that it answered; `loads`: those of them that did not find it on the device; `last`: when, in
    seconds since the epoch."""

    hits: int = 0
    loads: int = 0
    last: float | None = None

    def __add__(self, other: object) -> Used:
        if not isinstance(other, Used):
            return NotImplemented
        return Used(
            self.hits + other.hits, self.loads + other.loads, max(filter(None, (self.last, other.last)), default=None)
        )


NEVER = Used()


class Uses:
    """`note` is for the engine's thread alone, the rest for any."""

    def __init__(self) -> None:
        self._used: dict[str, Used] = {}
        self._latest: dict[str, str] = {}  # owner -> version

    def note(self, use: Use) -> None:
        loaded = use.tier is not Tier.DEVICE
        self._used[use.version] = self.of(use.version) + Used(1, int(loaded), use.time)
        self._latest[use.owner] = use.version

    def of(self, version: str) -> Used:
        return self._used.get(version, NEVER)

    def all(self) -> dict[str, Used]:
        """Every version that has been used."""
        return self._used.copy()

    def latest(self, owner: str) -> str | None:
        """The version that `owner` has used last, unless it is forgotten."""
        return self._latest.get(owner)

    def forget(self, owner: str, versions: Collection[str]) -> None:
        for version in versions:
            self._used.pop(version, None)
        if self.latest(owner) in versions:
            self._latest.pop(owner, None)
