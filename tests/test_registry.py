"""Publishing and deleting, with a store and without: after a kill at any moment all that was acknowledged is there."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from adapterhub.errors import BlockDamaged, StorageFull, Unavailable
from adapterhub.swap.database import Database
from adapterhub.swap.disk import DiskTier
from adapterhub.swap.mirror import Mirror
from adapterhub.swap.objects import server_id
from adapterhub.swap.registry import Registry
from adapterhub.swap.store import Store
from tests.killed import said_until_killed
from tests.test_block import make_block
from tests.test_disk import FaultyFS, failing


class Place:
    """A data directory, opened as a server does; `url` names its store."""

    def __init__(
        self, data: Path, url: str | None = None, budget: int | None = None, store: Store | None = None
    ) -> None:
        data.mkdir(exist_ok=True)
        self.data = data
        self.database = Database(data / "hub.db")
        self.store = store or (Store.open(url, server_id(self.database), data) if url else None)
        self.disk = DiskTier(data / "blobs", budget, self.store)
        self.registry = Registry(self.database, self.disk)
        if self.store and not self.registry.objects.any():
            self.store.create()
        self.removed = self.registry.clean_up()
        self.mirror = Mirror(self.database, self.registry.objects, self.disk, self.store) if self.store else None

    def publish(self, seed: int, name: str = "one", owner: str = "mira") -> str:
        return self.registry.publish(owner, name, make_block(seed=seed), "base", "import").id

    def settle(self) -> None:
        assert self.mirror is not None
        self.mirror.settle()

    def files(self) -> set[str]:
        return {path.stem for path in (self.data / "blobs").iterdir()}

    def objects(self) -> set[str]:
        assert self.store is not None
        return {found.digest for found in self.store.list()}

    def named(self) -> set[str]:
        return {v.digest for v in self.registry.versions()}

    def check(self) -> None:
        """Every version is whole, and nothing else is there."""
        for version in self.registry.versions():
            assert self.registry.block(version).digest == version.digest
        self.disk.files.check_integrity()
        if self.store is None:
            assert self.files() == self.named()
        else:
            assert self.files() <= self.named() == self.objects()


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path / 'store'}"


def test_what_is_published_lies_in_the_store_and_what_is_deleted_goes_from_everywhere(tmp_path: Path, url: str) -> None:
    place = Place(tmp_path / "data", url)
    place.publish(1)
    second = place.publish(2)
    place.publish(2, "two")
    place.check()
    place.registry.delete_version("mira", second)
    place.settle()
    place.check()
    assert len(place.objects()) == 2, "another adapter names the same block"
    place.registry.delete_adapter("mira", place.registry.versions()[-1].adapter)
    place.settle()
    place.check()
    assert len(place.objects()) == 1


def test_a_publish_that_the_store_refuses_changes_nothing(tmp_path: Path) -> None:
    fs = FaultyFS()
    place = Place(tmp_path / "data", store=Store(fs, "/b/p", "faulty://b/p", pauses=(0,)))
    place.publish(1)
    fs.fault = failing(ConnectionError("gone"), "put", "info", "rm")
    with pytest.raises(Unavailable):
        place.publish(2)
    with pytest.raises(Unavailable):
        place.publish(1)
    assert [v.number for v in place.registry.versions()] == [1]
    assert place.files() == place.named()
    gone = place.registry.delete_adapter("mira", place.registry.versions()[0].adapter)
    with pytest.raises(Unavailable):
        place.settle()
    fs.fault = lambda call: None
    place.settle()
    place.check()
    assert place.objects() == set()
    with pytest.raises(BlockDamaged):
        place.registry.block(gone[0])


def test_the_budget_and_the_bytes_used_are_right_without_a_look_at_the_files(tmp_path: Path) -> None:
    place = Place(tmp_path / "data")
    place.publish(1)
    size = place.registry.disk_used()
    assert size == sum(p.stat().st_size for p in (tmp_path / "data" / "blobs").iterdir())
    place.disk.set_budget(size)
    with pytest.raises(StorageFull):
        place.publish(2)
    place.registry.delete_adapter("mira", place.registry.versions()[0].adapter)
    assert place.registry.disk_used() == 0
    place.publish(2)
    place.database.close()
    assert Place(tmp_path / "data").registry.disk_used() == size


def test_blocks_from_before_there_was_a_store_are_brought_there_before_they_may_go(tmp_path: Path, url: str) -> None:
    before = Place(tmp_path / "data")
    before.publish(1)
    before.database.close()
    place = Place(tmp_path / "data", url)
    assert not place.disk.files.evict(1, "")
    place.settle()
    assert place.disk.files.evict(1, "")
    place.check()


def test_two_servers_may_share_a_store(tmp_path: Path, url: str) -> None:
    here, there = Place(tmp_path / "here", url), Place(tmp_path / "there", url)
    here.publish(1)
    there.publish(1)
    here.registry.delete_adapter("mira", here.registry.versions()[0].adapter)
    here.settle()
    there.disk.files.evict(1, "")
    there.check()
    assert here.objects() == set()


PUBLISHER = """
import random, sys
from pathlib import Path
from adapterhub.errors import NotFound
from tests.test_registry import Place
data, url, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
place, choose = Place(data, url, budget=30_000), random.Random(seed)
place.mirror.start()
print("ready", flush=True)
while True:
    name = f"n{choose.randrange(6)}"
    if choose.random() < 0.3:
        for version in place.registry.versions():
            if version.name == name:
                print("deleting", name, flush=True)
                place.registry.delete_adapter("mira", version.adapter)
                print("deleted", name, flush=True)
                break
    else:
        content = choose.randrange(40)
        print("publishing", name, flush=True)
        place.publish(content, name)
        print("published", name, content, flush=True)
"""


def publish_and_kill(data: Path, url: str, seed: int, seconds: float, expected: dict[str, int]) -> None:
    """Publishes and deletes in a process, kills it after so long, and brings `expected`, the content of each name, up
    to date; then starts again, and checks it."""
    unsure: set[str] = set()
    for line in said_until_killed(PUBLISHER, str(data), url, str(seed), seconds=seconds):
        what, name, *content = line.split()
        unsure = {name} if what in ("publishing", "deleting") else set()
        if what == "published" and content:
            expected[name] = int(content[0])
        elif what == "deleted":
            expected.pop(name, None)
    place = Place(data, url, budget=30_000)
    place.settle()
    place.check()
    found = {v.name: v for v in place.registry.versions() if v.current}
    assert found.keys() - unsure == expected.keys() - unsure
    for name, content_of in expected.items():
        if name not in unsure:
            assert torch.equal(place.registry.block(found[name]).payload, make_block(seed=content_of).payload)
    for name in unsure:
        expected.pop(name, None)
        if name in found:
            place.registry.delete_adapter("mira", found[name].adapter)
    place.settle()
    place.check()
    place.database.close()


def test_killed_at_any_moment_nothing_acknowledged_is_lost_and_nothing_else_is_left(tmp_path: Path, url: str) -> None:
    expected: dict[str, int] = {}
    for turn in range(4):
        publish_and_kill(tmp_path / "data", url, turn, 0.05 + 0.11 * turn, expected)


def test_every_query_of_a_request_or_a_publish_goes_by_an_index(tmp_path: Path) -> None:
    place = Place(tmp_path / "data")
    place.publish(1)
    plans = [
        "select v.id from versions v join adapters a on a.id = v.adapter where a.owner = 'x' and v.id = 'y'",
        "select v.id from versions v join adapters a on a.id = v.adapter "
        "where a.owner = 'x' and a.name = 'y' and v.id = a.current",
        "select v.id from versions v join adapters a on a.id = v.adapter where a.owner = 'x'",
        "select 1 from versions where digest = 'x' limit 1",
        "select max(number) from versions where adapter = 'x'",
    ]
    for sql in plans:
        details = [row["detail"] for row in place.database.rows(f"explain query plan {sql}")]
        assert not [d for d in details if d.startswith("SCAN")], (sql, details)


def test_the_mirror_does_not_disturb_uploads_that_are_under_way(tmp_path: Path) -> None:
    place = Place(tmp_path / "data", f"file://{tmp_path}/store")
    with ThreadPoolExecutor(1) as thread:
        publishing = thread.submit(lambda: [place.publish(seed, f"n{seed}") for seed in range(40)])
        while not publishing.done():
            place.settle()
    assert len(publishing.result()) == 40
    place.check()
