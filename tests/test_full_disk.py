"""A server whose disk is full, a small file system of its own: it says so, goes on serving, and takes deletions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from adapterhub.swap import ballast
from adapterhub.swap.database import Database
from tests.serving import PeftFiles, chat_lines, eventually, process

MIB = 1024**2
SIZE = 40 * MIB


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of `SIZE` bytes."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a file system of its own cannot be mounted: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(disk: Path) -> None:
    """To the last byte."""
    with (disk / "filler").open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)


def full(answer: httpx.Response) -> bool:
    return answer.status_code == 507 and answer.json()["error"]["code"] == "storage_full"


def test_a_full_disk_takes_no_more_and_serves_and_deletes_all_the_same(
    disk: Path, base_directory: Path, adapter: PeftFiles, other_adapter: PeftFiles
) -> None:
    with process(base_directory, disk, "--device-bytes", "8MiB", "--kv-bytes", "8MiB") as server:
        server.start()
        user, admin = server.user("mira"), server.user("admin", (disk / "admin.key").read_text().strip())
        gone = user.import_adapter(adapter, "gone")
        user.import_adapter(adapter, "kept")
        file, key = user.upload(chat_lines()), server.user("mira").key
        said = user.ask("mira/kept")
        job = user.train(chat_lines(60), suffix="trained", n_epochs=40)
        user.job(job, "running")
        fill(disk)

        assert full(user.http.post("/v1/adapters", data={"name": "new"}, files=other_adapter.upload))
        form = {"data": {"purpose": "user_data"}, "files": {"file": ("a", b"x" * MIB)}}
        assert full(user.http.post("/v1/files", **form))  # type: ignore[arg-type]
        budget = admin.http.get("/admin/tiers").json()["tiers"]["device"]["budget_bytes"]
        assert full(admin.http.patch("/admin/tiers", json={"device_bytes": budget // 2}))
        assert admin.http.get("/admin/tiers").json()["tiers"]["device"]["budget_bytes"] == budget
        assert user.ask("mira/kept") == said
        eventually(lambda: "jobs cannot be moved along" in server.logged)

        for path in (f"/v1/adapters/{gone['id']}", f"/v1/files/{file}"):
            fill(disk)
            assert user.http.delete(path).status_code == 200
            assert user.http.delete(path).status_code == 404
        identity = next(k["id"] for k in admin.http.get("/admin/keys").json()["data"] if key.endswith(k["hint"][-4:]))
        fill(disk)
        assert admin.http.delete(f"/admin/keys/{identity}").status_code == 200
        assert httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 401

        fill(disk)
        server.kill()
        server.start()
        user = server.user("mira", user.key)
        assert user.ask("mira/kept") == said
        assert "kept" in (names := {a["name"] for a in user.http.get("/v1/adapters").json()["data"]})
        assert not names & {"gone", "new"}
        (disk / "filler").unlink()
        eventually(lambda: (disk / "ballast").stat().st_size == ballast.NBYTES)
        ended = user.job(job)
        if ended.status == "succeeded":
            assert user.ask("mira/trained")
        else:
            assert (ended.status, ended.error.code) == ("failed", "storage_full")
        user.import_adapter(other_adapter, "new")
        assert user.ask("mira/new")


LIMITED = """
import resource, sys
from pathlib import Path
from adapterhub.errors import StorageFull
from adapterhub.swap.database import Database
database = Database(Path(sys.argv[1]) / "hub.db")
with database.transaction() as db:
    db.execute("create table t (content blob)")
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
written = 0
while True:
    try:
        database.insert("t", {"content": b"x" * 5000})
    except StorageFull:
        break
    written += 1
assert 10 < written == database.row("select count(*) as n from t")["n"]
"""


def test_a_database_that_a_limit_keeps_from_growing_is_a_full_disk(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_room_is_kept_only_where_there_is_as_much_besides(disk: Path) -> None:
    database = Database(disk / "hub.db")
    (disk / "large").write_bytes(bytes(SIZE - 2 * ballast.NBYTES))
    database.ballast.take()
    assert not (disk / "ballast").exists()
    (disk / "large").unlink()
    database.ballast.take()
    assert (disk / "ballast").stat().st_size == ballast.NBYTES
    for _ in range(3):
        fill(disk)
        with database.ballast.lent():
            (disk / "more").write_bytes(bytes(MIB // 2))
        (disk / "more").unlink()
    assert (disk / "ballast").stat().st_size == ballast.NBYTES - 3 * MIB // 2, "the rest is kept again"
    (disk / "filler").unlink()
    database.ballast.take()
    assert (disk / "ballast").stat().st_size == ballast.NBYTES
    database.close()
