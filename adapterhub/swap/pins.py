"""Pins: which adapters stay in memory, once they are there, whatever else is asked for.

A pin is of an adapter, what is kept is the block of its current version: whenever either changes, `settle` tells
whoever keeps the blocks.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from enum import StrEnum
from fractions import Fraction

from adapterhub.config import format_bytes
from adapterhub.errors import BadRequest, Forbidden
from adapterhub.swap.allocator import aligned
from adapterhub.swap.database import Database, Row
from adapterhub.swap.space import PINNED_SHARE

OWNER_SHARE = 1 / 16  # of the device's budget: what an owner's own pins may hold

_PINNED = "from adapters a join versions v on v.id = a.current where a.pinned is not null"


class PinnedBy(StrEnum):
    OWNER = "owner"
    ADMIN = "admin"


class Pins:
    """Safe to use from any thread. The columns are the registry's."""

    def __init__(self, database: Database, keep: Callable[[str, bool], None]) -> None:
        """`keep` is told the digest of a block that stays from now on, or may go. It must not block."""
        self._database = database
        self._keep = keep
        self._settling = threading.Lock()

    def pin(self, adapter: str, by: PinnedBy, device_bytes: int) -> None:
        """Pins an adapter, by its id. What the operator has pinned stays theirs.

        Raises BadRequest, and changes nothing, when the pins would hold too much of the device's `device_bytes`.
        """
        with self._database.transaction() as db:
            row = self._find(adapter)
            if row is None or row["pinned"] in (by, PinnedBy.ADMIN):
                return
            db.table("adapters").update(adapter, {"pinned": by})
            if by is PinnedBy.OWNER:
                own = self._bytes("a.owner = ? and a.pinned = ?", (row["owner"], by))
                _check(own, device_bytes, OWNER_SHARE, "your pins", "an owner's", "ask the operator to pin it")
            if row["pinned"] is None:
                held = self._bytes("true", ())
                if by is PinnedBy.ADMIN:
                    _check(held, device_bytes, PINNED_SHARE, "all owners' pins together", "all", "raise the budget")
                elif held > device_bytes * PINNED_SHARE:  # how much others have pinned is not for owners to know
                    raise BadRequest("No more can be pinned on this server. Ask the operator.", param="id")
        self.settle([row["digest"]])

    def unpin(self, adapter: str, by: PinnedBy) -> None:
        """Raises Forbidden when an owner would unpin what the operator has pinned."""
        with self._database.transaction() as db:
            row = self._find(adapter)
            if row is None or row["pinned"] is None:
                return
            if by is PinnedBy.OWNER and row["pinned"] == PinnedBy.ADMIN:
                raise Forbidden("The operator has pinned this adapter, and only they can unpin it.")
            db.table("adapters").update(adapter, {"pinned": None})
        self.settle([row["digest"]])

    def settle(self, digests: Iterable[str]) -> None:
        """Tells of each block whether it stays: whether some pinned adapter's current version has it."""
        asked = list(dict.fromkeys(digests))
        with self._settling:  # who asks last tells last
            sql = f"select distinct v.digest {_PINNED} and v.digest in (select value from json_each(?))"
            pinned = {row["digest"] for row in self._database.rows(sql, (json.dumps(asked),))}
            for digest in asked:
                self._keep(digest, digest in pinned)

    def _find(self, adapter: str) -> Row | None:
        sql = "select a.owner, a.pinned, v.digest from adapters a join versions v on v.id = a.current where a.id = ?"
        return self._database.row(sql, (adapter,))

    def _bytes(self, where: str, args: tuple[str, ...]) -> int:
        """What those blocks take on the device, each once however many adapters have it."""
        rows = self._database.rows(f"select distinct v.digest, v.nbytes {_PINNED} and {where}", args)
        return sum(aligned(row["nbytes"]) for row in rows)


def _check(held: int, device_bytes: int, share: float, whose: str, of: str, otherwise: str) -> None:
    limit = int(device_bytes * share)
    if held > limit:
        raise BadRequest(
            f"With this adapter {whose} would hold {format_bytes(held)}; {of} may hold {format_bytes(limit)}, "
            f"{Fraction(share)} of the device's {format_bytes(device_bytes)}. Unpin another, or {otherwise}.",
            param="id",
        )
