"""Lists of adapters from SQL, compared with the same done by hand in Python."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from adapterhub.config import MIB
from adapterhub.errors import BadRequest
from adapterhub.swap.catalog import Catalog, Filter, Order
from adapterhub.swap.database import Database
from adapterhub.swap.disk import DiskTier
from adapterhub.swap.registry import Registry
from adapterhub.swap.versions import Kind

COUNT = 200


@dataclass
class Shelf:
    """A catalog of adapters whose rows were written as they are, with no block behind them."""

    catalog: Catalog
    rows: list[dict[str, Any]]

    def expected(self, which: Filter, order: Order, descending: bool) -> list[str]:
        keys = {Order.NAME: "owner", Order.BYTES: "nbytes", Order.CREATED: "created_at"}
        found = [r for r in self.rows if which.owner in (None, r["owner"])]
        found = [r for r in found if which.name is None or which.name.lower() in r["name"].lower()]
        found = [r for r in found if which.pinned in (None, r["pinned"] is not None)]
        found.sort(key=lambda r: (r[keys[order]], r["owner"], r["name"]), reverse=descending)
        return [r["id"] for r in found]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    directory = tmp_path_factory.mktemp("catalog")
    database = Database(directory / "hub.db")
    registry = Registry(database, DiskTier(directory / "blobs", MIB))
    draw = random.Random(1)
    rows: list[dict[str, Any]] = []
    for i in range(COUNT):
        rows.append(
            {
                "id": f"adapter-{draw.randbytes(4).hex()}",
                "owner": f"owner-{i % 7}",
                "name": f"{draw.choice(('Chat', 'style', '50%_a'))}-{i}",
                "nbytes": draw.choice((0, 100, 200, 300)),  # 0: it has no release yet
                "created_at": draw.choice((10, 20)),
                "pinned": draw.choice((None, None, "owner", "admin")),
            }
        )
    with database.transaction() as db:
        for row in rows:
            more = {"current": f"{row['id']}-2" if row["nbytes"] else None}
            db.table("adapters").insert({**{k: v for k, v in row.items() if k != "nbytes"}, **more})
            for number in (1, 2):
                version = {"id": f"{row['id']}-{number}", "adapter": row["id"], "number": number, "digest": row["id"]}
                kept = {"nbytes": row["nbytes"] if number == 2 else 1, "created_at": row["created_at"]}
                fixed = {
                    "kind": "release" if row["nbytes"] else "candidate",
                    "rank": 4,
                    "fingerprint": "f",
                    "base": "tiny",
                    "origin": "import",
                }
                db.table("versions").insert({**version, **kept, **fixed})
    yield Shelf(Catalog(database, registry), rows)
    database.close()


FILTERS = [
    Filter(),
    Filter(owner="owner-3"),
    Filter(owner="nobody"),
    Filter(name="CHAT"),
    Filter(name="%"),
    Filter(name="_"),
    Filter(pinned=True),
    Filter(pinned=False, owner="owner-1", name="s"),
]


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("order", list(Order))
@pytest.mark.parametrize("which", FILTERS)
def test_pages_one_after_the_other_are_the_whole_list_in_order(
    shelf: Shelf, which: Filter, order: Order, descending: bool
) -> None:
    expected = shelf.expected(which, order, descending)
    assert [m.adapter for m in shelf.catalog.matching(which, order, descending=descending)] == expected
    seen: list[str] = []
    after = None
    while True:
        page = shelf.catalog.page(which, order, descending=descending, after=after, limit=9)
        assert page.total == len(expected)
        for versions in shelf.catalog.versions(page.adapters):
            released = versions[0].kind is Kind.RELEASE
            assert [(v.number, v.current) for v in versions] == [(2, released), (1, False)]
            seen.append(versions[0].adapter)
        assert page.has_more is (len(seen) < len(expected))
        if not page.has_more:
            break
        after = seen[-1]
    assert seen == expected


def test_without_a_limit_a_page_is_everything(shelf: Shelf) -> None:
    page = shelf.catalog.page(Filter(), Order.NAME, descending=False)
    assert len(page.adapters) == page.total == COUNT
    assert not page.has_more


def test_a_page_after_what_there_is_not_or_is_anothers_is_refused_alike(shelf: Shelf) -> None:
    theirs = next(r["id"] for r in shelf.rows if r["owner"] == "owner-2")
    for after in ("adapter-none", theirs):
        with pytest.raises(BadRequest, match=f"There is no item '{after}'"):
            shelf.catalog.page(Filter(owner="owner-1"), Order.NAME, descending=False, after=after)
