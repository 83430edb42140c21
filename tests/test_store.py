"""The object store through fsspec: what comes back is what was put there, and errors say what to do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapterhub.errors import BadRequest, Unavailable
from adapterhub.swap.store import Store, StoredObject
from tests.serving import SECONDS, eventually
from tests.test_disk import FaultyFS, failing


@pytest.fixture
def content(tmp_path: Path) -> Path:
    path = tmp_path / "content"
    path.write_bytes(b"0123456789")
    return path


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_what_is_put_comes_back_until_it_is_deleted(tmp_path: Path, content: Path, kind: str) -> None:
    url = f"file://{tmp_path}/there/deep" if kind == "file" else f"memory://{tmp_path.name}/deep"
    store = Store.open(url, "server", tmp_path / "data")
    store.create()
    assert store.list() == []
    assert not store.get("d1", tmp_path / "back", 1)
    store.put("d1", content)
    store.put("d1", content)
    assert store.list() == [StoredObject("d1", 10)]
    assert store.size("d1") == 10
    assert store.size("d2") is None
    assert store.get("d1", tmp_path / "back", 1)
    assert (tmp_path / "back").read_bytes() == b"0123456789"
    another = Store.open(url, "another", tmp_path / "data")
    another.create()
    assert another.list() == []
    store.delete("d1")
    store.delete("d1")
    assert store.list() == []


def test_only_blocks_are_listed(tmp_path: Path, content: Path) -> None:
    store = Store.open(f"file://{tmp_path}/there", "server", tmp_path / "data")
    store.create()
    store.put("d1", content)
    place = tmp_path / "there" / "server"
    for name in ("README", "d2.block.0011.partial", "d3.block.0022.partial"):
        (place / name).write_bytes(b"x")
    assert store.list() == [StoredObject("d1", 10)]
    assert store.partials() == {"d2", "d3"}
    store.remove_partials("d2")
    assert {path.name for path in place.iterdir()} == {"README", "d1.block", "d3.block.0022.partial"}


def test_a_directory_that_is_gone_is_a_store_that_is_gone_and_not_an_empty_one(tmp_path: Path, content: Path) -> None:
    store = Store.open(f"file://{tmp_path}/there", "server", tmp_path / "data")
    store.create()
    store.put("d1", content)
    (tmp_path / "there").rename(tmp_path / "elsewhere")
    asked: list[Callable[[], object]] = [
        lambda: store.put("d2", content),
        lambda: store.get("d1", tmp_path / "back", 1),
        lambda: store.size("d1"),
        lambda: store.delete("d1"),
        store.list,
    ]
    for ask in asked:
        with pytest.raises(Unavailable, match="does not answer"):
            ask()
    assert not (tmp_path / "there").exists()
    (tmp_path / "elsewhere").rename(tmp_path / "there")
    assert store.list() == [StoredObject("d1", 10)]


def test_an_upload_of_which_the_store_has_less_is_none(content: Path) -> None:
    fs = FaultyFS()
    store = Store(fs, "/b/p", pauses=(0, 0))
    fs.info = lambda path, **kwargs: {"size": 3}  # type: ignore[method-assign]
    with pytest.raises(Unavailable, match="upload failed"):
        store.put("d1", content)
    assert fs.calls["put"] == 3


def test_what_will_not_change_is_not_tried_again(content: Path) -> None:
    fs = FaultyFS()
    store = Store(fs, "/b/p", pauses=(0, 0))
    fs.fault = failing(PermissionError("no"), "put")
    with pytest.raises(Unavailable, match="PermissionError"):
        store.put("d1", content)
    assert fs.calls["put"] == 1


@pytest.fixture
def hanging() -> Iterator[tuple[Store, FaultyFS, threading.Event]]:
    """A store that gives up after a moment, and whose uploads hang until the event."""
    fs, go = FaultyFS(), threading.Event()
    fs.fault = lambda call: go.wait(SECONDS) if call == "put" else None  # type: ignore[assignment,return-value]
    yield Store(fs, "/b/p", pauses=(0, 0), patience=0.01), fs, go
    go.set()


def test_an_upload_that_hangs_is_given_up_on_and_its_object_not_deleted_as_long_as_it_may_come(
    content: Path, hanging: tuple[Store, FaultyFS, threading.Event]
) -> None:
    store, fs, go = hanging
    with pytest.raises(Unavailable, match="upload failed"):
        store.put("d1", content)
    assert fs.calls["put"] == 1, "another attempt would hang as well"
    with pytest.raises(Unavailable, match="deletion failed"):
        store.delete("d1")
    store.delete("d2")
    go.set()
    eventually(lambda: store.size("d1") == 10)
    eventually(lambda: not store._astray)
    store.delete("d1")
    assert store.list() == []


def test_after_so_many_attempts_that_hang_a_store_is_asked_rarely(
    content: Path, hanging: tuple[Store, FaultyFS, threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, fs, go = hanging
    monkeypatch.setattr("adapterhub.swap.store.MOST_ASTRAY", 2)
    for digest in ("d1", "d2"):
        with pytest.raises(Unavailable):
            store.put(digest, content)
    store._patience = SECONDS
    with pytest.raises(Unavailable, match="does not answer"):
        store.put("d3", content)
    assert fs.calls["put"] == 2
    go.set()
    eventually(lambda: not store._astray)
    store.put("d3", content)
    assert {found.digest for found in store.list()} == {"d1", "d2", "d3"}


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("/a/directory", "is not a store"),
        ("file://", "is not a store"),
        ("nosuch://a/b", "Protocol not known"),
        ("s3://bucket/prefix", r"adapterhub\[s3\]"),
    ],
)
def test_a_store_that_cannot_be_used_is_said(tmp_path: Path, url: str, reason: str) -> None:
    if url.startswith("s3"):
        try:
            import s3fs  # noqa: F401

            pytest.skip("its driver is installed")
        except ImportError:
            pass
    with pytest.raises(BadRequest, match=reason):
        Store.open(url, "server", tmp_path)


def test_a_store_within_the_data_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="outside"):
        Store.open(f"file://{tmp_path}/blobs", "server", tmp_path)
