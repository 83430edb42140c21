"""Servers with an object store: the disk is a cache, and what the store has is there after a `kill -9`, and while the
store is gone for as many as need nothing of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tests.serving import PeftFiles, Process, User, chat_lines, eventually, process, run_cli

SIZES = ("--device-bytes", "8MiB", "--kv-bytes", "8MiB")
DRIVER = """
import os, time
from pathlib import Path
import fsspec

ROOT = Path(os.environ["FAULTY"])

def fault():
    return (ROOT / "fault").read_text()

class Faulty(fsspec.AbstractFileSystem):
    protocol = "faulty"

    def get_file(self, rpath, lpath, **options):
        content = (ROOT / rpath).read_bytes()
        while fault() == "hangs":
            (ROOT / "hanging").touch()
            time.sleep(0.05)
        Path(lpath).write_bytes(content[:5000] if fault() == "cuts" else content)

    def put_file(self, lpath, rpath, **options):
        (ROOT / rpath).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / rpath).write_bytes(Path(lpath).read_bytes())

    def info(self, path, **options):
        nbytes = (ROOT / path).stat().st_size
        return {"name": path, "size": nbytes + 7 if fault() == "lies" else nbytes, "type": "file"}

    def ls(self, path, detail=True, **options):
        return [self.info(f"{path}/{entry.name}") for entry in (ROOT / path).iterdir()]

    def rm_file(self, path):
        (ROOT / path).unlink()

fsspec.register_implementation("faulty", Faulty)
"""


class Stored:
    """A server's process, its store, and one owner."""

    def __init__(self, server: Process, store: Path) -> None:
        self.server, self.store = server.start(), store
        self.user = server.user("mira")

    def again(self) -> None:
        """`kill -9`, and the next start."""
        self.server.kill()
        self.server.start()
        self.user = self.server.user("mira", self.user.key)

    @property
    def admin(self) -> User:
        return self.server.user("admin", (self.server.data_dir / "admin.key").read_text().strip())

    def leave_memory(self, *adapters: str) -> None:
        for adapter in adapters:
            self.admin.http.post(f"/admin/adapters/{adapter}/evict").raise_for_status()

    def leave_disk(self) -> None:
        """All that the store has."""
        forget = {"disk": {"ttl_seconds": 1e-9}}
        for rules in (forget, {"disk": {"ttl_seconds": None}}):
            self.admin.http.patch("/admin/policy", json=rules).raise_for_status()
        assert self.files() == set()

    def files(self) -> set[str]:
        return {path.name for path in (self.server.data_dir / "blobs").iterdir()}

    def objects(self) -> set[str]:
        return {path.name for path in self.store.glob("*/*")}

    def refused(self, name: str) -> str:
        """The code with which an adapter does not answer."""
        answer = self.user.http.post("/v1/completions", json={"model": name, "prompt": [5], "max_tokens": 1})
        assert answer.status_code == 503, answer.text
        return answer.json()["error"]["code"]


@pytest.fixture
def stored(base_directory: Path, tmp_path: Path) -> Iterator[Stored]:
    store = tmp_path / "store"
    with process(base_directory, tmp_path / "data", *SIZES, "--store", f"file://{store}") as server:
        yield Stored(server, store)


def test_what_left_the_disk_is_fetched_and_nothing_is_lost_by_kills(
    stored: Stored, adapter: PeftFiles, other_adapter: PeftFiles
) -> None:
    user = stored.user
    made = [user.import_adapter(files, name)["id"] for name, files in (("a", adapter), ("b", other_adapter))]
    user.job(user.train(chat_lines(), suffix="c", n_epochs=1, keep_checkpoints=0), "succeeded")
    names = [f"mira/{name}" for name in "abc"]
    said = {name: user.ask(name) for name in names}
    trained = user.http.get("/v1/adapters", params={"name": "c"}).json()["data"][0]["id"]
    stored.leave_memory(*made, trained)
    stored.leave_disk()
    assert len(stored.objects()) == 3
    assert [user.tier(name) for name in names] == ["remote"] * 3
    assert stored.files() == stored.objects()
    assert {name: user.ask(name) for name in names} == said
    stored.leave_disk()
    stored.again()
    assert {name: stored.user.ask(name) for name in names} == said
    stored.user.http.delete(f"/v1/adapters/{made[0]}").raise_for_status()
    stored.again()
    assert [a["name"] for a in stored.user.http.get("/v1/adapters").json()["data"]] == ["b", "c"]
    eventually(lambda: len(stored.objects()) == 2)
    assert stored.files() == stored.objects()
    url = f"file://{stored.store}"
    found = run_cli("doctor", "--data-dir", str(stored.server.data_dir), "--store", url)
    assert found.returncode == 0, found.stdout


def test_a_store_that_is_gone_fails_those_who_need_it_and_them_alone(
    stored: Stored, adapter: PeftFiles, other_adapter: PeftFiles, base_model: PreTrainedModel, tmp_path: Path
) -> None:
    user = stored.user
    far, near = (user.import_adapter(files, name) for name, files in (("far", adapter), ("near", other_adapter)))
    said = {name: user.ask(f"mira/{name}") for name in ("far", "near")}
    stored.leave_memory(far["id"], near["id"])
    stored.leave_disk()
    assert user.ask("mira/near") == said["near"], "it is on the disk again"
    stored.leave_memory(near["id"])
    stored.store.rename(tmp_path / "elsewhere")
    assert stored.refused("mira/far") == "store_unavailable"
    assert user.tier("mira/near") == "disk"
    assert user.ask("mira/near") == said["near"]
    third = PeftFiles(base_model, tmp_path / "third", seed=3)
    refused = user.http.post("/v1/adapters", data={"name": "late"}, files=third.upload)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
    assert user.http.get(f"/v1/adapters/{far['id']}/download").status_code == 503
    assert [a["name"] for a in user.http.get("/v1/adapters").json()["data"]] == ["far", "near"]
    stored.again()
    user = stored.user
    assert stored.refused("mira/far") == "store_unavailable"
    assert user.ask("mira/near") == said["near"]
    user.http.delete(f"/v1/adapters/{near['id']}").raise_for_status()
    assert not stored.store.exists()
    (tmp_path / "elsewhere").rename(stored.store)
    assert user.ask("mira/far") == said["far"]
    stored.again()
    eventually(lambda: stored.objects() == stored.files() and len(stored.objects()) == 1)
    assert stored.user.ask("mira/far") == said["far"]


def test_a_store_that_lies_about_sizes_cuts_off_or_hangs_harms_nobody_who_needs_nothing_of_it(
    base_directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    adapter: PeftFiles,
    other_adapter: PeftFiles,
    base_model: PreTrainedModel,
) -> None:
    hook, root = tmp_path / "hook", tmp_path / "faulty"
    for directory in (hook, root):
        directory.mkdir()
    (hook / "sitecustomize.py").write_text(DRIVER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(hook), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("FAULTY", str(root))
    store_is = (root / "fault").write_text
    store_is("well")
    with process(base_directory, tmp_path / "data", *SIZES, "--store", "faulty://bucket/prefix") as server:
        stored = Stored(server, root / "bucket" / "prefix")
        user = stored.user
        far, near = (user.import_adapter(files, name) for name, files in (("far", adapter), ("near", other_adapter)))
        said = {name: user.ask(f"mira/{name}") for name in ("far", "near")}
        objects = stored.objects()
        stored.leave_memory(far["id"], near["id"])
        stored.leave_disk()
        assert user.ask("mira/near") == said["near"], "it is on the disk again"

        store_is("lies")
        late = PeftFiles(base_model, tmp_path / "late", seed=3)
        refused = user.http.post("/v1/adapters", data={"name": "late"}, files=late.upload)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
        assert user.ask("mira/near") == said["near"]

        store_is("cuts")
        cut_off = user.http.post("/v1/completions", json={"model": "mira/far", "prompt": [5], "max_tokens": 1})
        assert (cut_off.status_code, cut_off.json()["error"]["code"]) == (500, "block_damaged")
        assert user.ask("mira/near") == said["near"]

        store_is("hangs")
        with ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(user.ask, "mira/far")
            eventually((root / "hanging").exists)
            assert user.ask("mira/near") == said["near"]
            assert not waiting.done()
            store_is("well")
            assert waiting.result() == said["far"]
        user.import_adapter(late, "late")
        eventually(lambda: len(stored.objects()) == len(objects) + 1)
