"""Lists of adapters: filtered, sorted and paged in SQL, so that a page costs what it shows, not how many there are.

Where a block is and how it is used are no columns: `matching` then gives all that the columns let through, and the
caller joins, sorts and cuts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from adapterhub.errors import BadRequest
from adapterhub.swap.database import Database
from adapterhub.swap.registry import Registry
from adapterhub.swap.uses import NEVER, Used
from adapterhub.swap.versions import Version


class Order(StrEnum):
    """The columns a list can be sorted by; equals come by owner and name."""

    NAME = "name"
    BYTES = "bytes"
    CREATED = "created"


_KEYS = {
    Order.NAME: ("a.owner", "a.name"),
    Order.BYTES: ("coalesce(v.nbytes, 0)", "a.owner", "a.name"),
    Order.CREATED: ("a.created_at", "a.owner", "a.name"),
}
_FROM = "from adapters a left join versions v on v.id = a.current"


@dataclass(frozen=True)
class Filter:
    """Which adapters. None: any."""

    owner: str | None = None
    name: str | None = None  # a part of the adapter's name, in whatever case
    pinned: bool | None = None

    @property
    def sql(self) -> tuple[str, list[object]]:
        """A condition, and its arguments."""
        conditions: list[str] = ["true"]
        args: list[object] = []
        if self.owner is not None:
            conditions.append("a.owner = ?")
            args.append(self.owner)
        if self.name is not None:
            conditions.append("instr(lower(a.name), lower(?)) > 0")
            args.append(self.name)
        if self.pinned is not None:
            conditions.append("a.pinned is not null" if self.pinned else "a.pinned is null")
        return " and ".join(conditions), args


class Match(NamedTuple):
    """An adapter, and the digest of its current version; None while it has none."""

    adapter: str
    digest: str | None


class Found(NamedTuple):
    """A page: ids of adapters. `total`: how many the filter lets through."""

    adapters: list[str]
    total: int
    has_more: bool


class Catalog:
    """Safe to use from any thread."""

    def __init__(self, database: Database, registry: Registry) -> None:
        self._database = database
        self._registry = registry

    def page(
        self, which: Filter, order: Order, *, descending: bool, after: str | None = None, limit: int | None = None
    ) -> Found:
        """The `limit` adapters (None: all) that follow the one with the id `after`. Raises BadRequest for an unknown
        one; another owner's is as unknown as none."""
        condition, args = which.sql
        [counted] = self._database.rows(f"select count(*) as n from adapters a where {condition}", args)
        if after is not None:
            keys = ", ".join(_KEYS[order])
            own = "a.id = ? and (? is null or a.owner = ?)"
            place = self._database.row(f"select {keys} {_FROM} where {own}", (after, which.owner, which.owner))
            if place is None:
                raise unknown_cursor(after)
            marks = ", ".join("?" * len(place))
            condition += f" and ({keys}) {'<' if descending else '>'} ({marks})"
            args = [*args, *place.values()]
        rows = self._database.rows(
            f"select a.id {_FROM} where {condition} order by {_sorted(order, descending)} limit ?",
            [*args, -1 if limit is None else limit + 1],
        )
        ids = [row["id"] for row in rows]
        shown = ids if limit is None else ids[:limit]
        return Found(shown, counted["n"], len(ids) > len(shown))

    def matching(self, which: Filter, order: Order, *, descending: bool) -> list[Match]:
        """All that the filter lets through."""
        condition, args = which.sql
        rows = self._database.rows(
            f"select a.id, v.digest {_FROM} where {condition} order by {_sorted(order, descending)}", args
        )
        return [Match(row["id"], row["digest"]) for row in rows]

    def versions(self, adapters: Iterable[str]) -> list[list[Version]]:
        """All versions of each, the newest first; less those that have been deleted meanwhile."""
        found: dict[str, list[Version]] = {adapter: [] for adapter in adapters}
        for version in self._registry.adapters(list(found)):
            found[version.adapter].append(version)
        return [versions for versions in found.values() if versions]

    def models_of(self, digests: Iterable[str]) -> dict[str, list[str]]:
        """The names of the versions that have those blocks, by digest: of a current one its adapter's."""
        found: dict[str, list[str]] = {}
        for version in self._registry.of_blocks(digests):
            found.setdefault(version.digest, []).append(version.alias if version.current else version.model)
        return found

    def by_adapter(self, used: Mapping[str, Used]) -> dict[str, Used]:
        """The uses of versions, by id, as those of their adapters."""
        sql = "select id, adapter from versions where id in (select value from json_each(?))"
        found: dict[str, Used] = {}
        for row in self._database.rows(sql, (json.dumps(list(used)),)):
            found[row["adapter"]] = found.get(row["adapter"], NEVER) + used[row["id"]]
        return found


def _sorted(order: Order, descending: bool) -> str:
    return ", ".join(f"{key} {'desc' if descending else 'asc'}" for key in _KEYS[order])


def unknown_cursor(after: str) -> BadRequest:
    return BadRequest(f"There is no item {after[:80]!r} to go on after.", param="after")
