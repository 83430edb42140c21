"""What `adapterhub doctor` finds, mends, and removes only if it may: damaged, lost and unowned files and objects."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from adapterhub.errors import NotFound
from adapterhub.swap.blobs import Named
from adapterhub.swap.ref import Tier
from adapterhub.swap.repair import Report, Unowned, inspect, repair
from tests.serving import run_cli
from tests.test_registry import Place


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path / 'store'}"


def inspected(place: Place, url: str | None = None) -> Report:
    return inspect(place.database, place.data / "blobs", url, place.data)


def repaired(place: Place, url: str | None = None) -> tuple[Report, Unowned]:
    """By an operator who agrees, and what they agreed to."""
    agreed: list[Unowned] = []
    return repair(place.database, place.data / "blobs", url, place.data, agreed.append), agreed[0]


def damage(place: Place, version: str) -> Path:
    path = place.disk.files.path(place.registry.version("mira", version).digest)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    return path


def test_repair_without_a_store_says_what_is_lost_and_leaves_the_others(tmp_path: Path) -> None:
    data = tmp_path / "data"
    place = Place(data)
    bad, good = place.publish(1, "bad"), place.publish(2, "good")
    path = damage(place, bad)
    (data / "blobs" / f"{'0' * 64}.block").write_bytes(b"nobody's")
    before = sorted(p for p in data.rglob("*") if "hub.db" not in p.name)
    seen = inspected(place)
    assert [(f.version, f.path) for f in seen.faults] == [("mira/bad, version 1", path)]
    assert sorted(p for p in data.rglob("*") if "hub.db" not in p.name) == before, "it changes nothing"
    done = repaired(place)[0]
    assert ([f.version for f in done.faults], done.removed) == (["mira/bad, version 1"], 1)
    assert place.registry.block(place.registry.version("mira", good)).digest
    assert [v.name for v in place.registry.versions()] == ["bad", "good"], "its owner may still delete it"
    with pytest.raises(NotFound):
        place.registry.version("teo", bad)


def test_repair_with_a_store_mends_brings_there_and_removes(tmp_path: Path, url: str) -> None:
    data = tmp_path / "data"
    place = Place(data, url)
    bad, only_here = place.publish(1, "bad"), place.publish(2, "here")
    damage(place, bad)
    assert place.store is not None
    place.store.delete(place.registry.version("mira", only_here).digest)
    place.registry.objects.deleted(place.registry.version("mira", only_here).digest)
    place.store.put("0" * 64, place.disk.files.path(place.registry.version("mira", only_here).digest))
    assert inspected(place, url).unnamed == 1
    done = repaired(place, url)[0]
    assert (done.faults, done.mended, done.removed) == ([], ["mira/bad, version 1"], 1)
    again = Place(data, url)
    again.check()
    assert inspected(again, url).faults == []


def test_a_good_block_that_was_set_aside_is_put_back(tmp_path: Path) -> None:
    place = Place(tmp_path / "data")
    version = place.registry.version("mira", place.publish(1))
    place.disk.files.set_aside(version.digest)
    done = repaired(place)[0]
    assert (done.faults, done.mended) == ([], ["mira/one, version 1"])


def test_what_lies_in_a_store_alone_is_not_called_lost_when_no_store_is_given(tmp_path: Path, url: str) -> None:
    place = Place(tmp_path / "data", url)
    place.publish(1)
    place.disk.files.evict(1, "")
    place.disk.files.settle([Named("absent", "mira")])
    seen = inspected(place)
    assert (seen.faults, seen.unseen) == ([], {url: 1})
    assert inspected(place, url).in_store == 1
    assert place.disk.tier_of(place.registry.versions()[0].digest) is Tier.REMOTE


@pytest.mark.parametrize("harm", ["lost", "cut off"])
def test_what_the_store_has_no_more_or_not_whole_is_said_and_uploaded_again(
    tmp_path: Path, url: str, harm: str
) -> None:
    place = Place(tmp_path / "data", url)
    harmed = place.publish(1, "harmed")
    place.publish(2, "good")
    digest = place.registry.version("mira", harmed).digest
    [stored] = (tmp_path / "store").glob(f"*/{digest}.block")
    stored.unlink() if harm == "lost" else os.truncate(stored, stored.stat().st_size - 1)
    [fault] = inspected(place, url).faults
    assert fault.version == "mira/harmed, version 1"
    assert "the store has" in fault.reason
    done, agreed = repaired(place, url)
    assert (done.faults, done.mended, done.removed) == ([], ["mira/harmed, version 1, in the store"], 0)
    assert agreed == Unowned([], [])
    assert inspected(place, url).faults == []
    again = Place(tmp_path / "data", url)
    while again.disk.files.evict(1, ""):
        pass
    assert again.files() == set()
    again.check()


def test_an_object_that_was_cut_off_is_named_when_nothing_else_is_left(tmp_path: Path, url: str) -> None:
    place = Place(tmp_path / "data", url)
    place.publish(1)
    [stored] = (tmp_path / "store").glob("*/*.block")
    os.truncate(stored, 100)
    place.disk.files.evict(1, "")
    assert [f.version for f in inspected(place, url).faults] == ["mira/one, version 1"]
    assert [f.version for f in repaired(place, url)[0].faults] == ["mira/one, version 1"]


def test_a_damaged_file_whose_object_is_no_better_is_called_lost(tmp_path: Path, url: str) -> None:
    place = Place(tmp_path / "data", url)
    bad = place.publish(1)
    [stored] = (tmp_path / "store").glob("*/*.block")
    stored.write_bytes(damage(place, bad).read_bytes())
    done, _ = repaired(place, url)
    assert ([f.version for f in done.faults], done.in_store) == (["mira/one, version 1"], 0)


def test_a_new_store_is_filled(tmp_path: Path, url: str) -> None:
    place = Place(tmp_path / "data")
    place.publish(1)
    assert repaired(place, url)[0].faults == []
    assert [path.stem for path in (tmp_path / "store").glob("*/*")] == [v.digest for v in place.registry.versions()]


def test_an_older_database_costs_nothing_that_is_newer_unless_the_operator_agrees(tmp_path: Path, url: str) -> None:
    place = Place(tmp_path / "data", url)
    place.publish(1, "old")
    place.database.scrub()
    backup = (tmp_path / "data" / "hub.db").read_bytes()
    place.publish(2, "new")
    [newer] = {v.digest for v in place.registry.versions() if v.name == "new"}
    place.database.close()
    for name in ("hub.db-wal", "hub.db-shm"):
        (tmp_path / "data" / name).unlink(missing_ok=True)
    (tmp_path / "data" / "hub.db").write_bytes(backup)

    def there() -> tuple[bool, bool]:
        """In blobs/, and in the store."""
        here = (tmp_path / "data" / "blobs" / f"{newer}.block").exists()
        return here, any((tmp_path / "store").glob(f"*/{newer}.block"))

    command = ("doctor", "--repair", "--data-dir", str(tmp_path / "data"), "--store", url)
    refused = run_cli(*command)
    assert (refused.returncode, there()) == (1, (True, True))
    assert "give --yes" in refused.stdout
    assert refused.stderr.count(newer) == 2, "what would go is named"
    done = run_cli(*command, "--yes")
    assert (done.returncode, there()) == (0, (False, False)), done.stdout
    assert run_cli(*command).returncode == 0, "there is nothing more to ask"
