"""Erasing an owner: nothing of them stays anywhere, while others' requests go on; wherever it is killed, the next start
takes it to its end; and what is exported before."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import re
import shutil
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from safetensors.torch import load

from adapterhub.api.archive import stream_zip
from adapterhub.api.hub import Hub
from adapterhub.base.model import Base, load_base
from adapterhub.config import MIB
from adapterhub.errors import NotFound
from adapterhub.swap.frames import read_trace
from tests.serving import BASE, PeftFiles, Server, User, chat_lines, process, run_cli, running, small_config

SECRET = "my dog is called Bellerophon"
KINDS = ("keys", "files", "uploads", "jobs", "events", "adapters", "versions", "usage", "quotas", "kv_blocks", "uses")


def fill(server: Server, owner: str, adapter: PeftFiles) -> User:
    """An owner who has something of every kind."""
    user = server.user(owner=owner)
    secret = f"{owner}: {SECRET}"
    user.upload(secret.encode(), name=f"{secret}.txt", purpose="user_data")
    upload = user.openai.uploads.create(bytes=100, filename=secret, mime_type="text/plain", purpose="user_data")
    user.openai.uploads.parts.create(upload.id, data=secret.encode())
    lines = chat_lines(answer=secret)
    job = user.openai.fine_tuning.jobs.create(
        model=BASE, training_file=user.upload(lines), suffix="trained", hyperparameters={"n_epochs": 1}
    )
    user.job(job.id, "succeeded")
    made = user.import_adapter(adapter, "imported")
    user.http.post(f"/v1/adapters/{made['id']}/pin").raise_for_status()
    user.ask(f"{owner}/imported", secret * 3, response_format={"type": "json_object"})
    server.hub.quotas.change(owner, {"jobs": 5})
    server.admin.http.patch("/admin/policy", json={"device": {"owners": {owner: {"priority": 2}}}}).raise_for_status()
    workspace = server.hub.config.jobs_dir / job.id
    workspace.mkdir(parents=True, exist_ok=True)
    (workspace / "state.safetensors").write_bytes(secret.encode())
    server.hub.trace.flush()
    server.hub.meter.save()
    return user


def traces_of(words: str, directory: Path) -> list[str]:
    """The files in whose bytes or names the words are."""
    found = []
    for path in directory.rglob("*"):
        if path.is_file() and (words.encode() in path.read_bytes() or words in path.name):
            found.append(str(path.relative_to(directory)))
    return found


def erased(server: Server, owner: str) -> dict[str, Any]:
    return server.admin.http.delete(f"/admin/users/{owner}").raise_for_status().json()


@pytest.fixture(scope="module")
def base(base_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(small_config(base_directory, tmp_path_factory.mktemp("base")))


# -- what goes, and what stays


def test_nothing_of_an_erased_owner_stays_and_all_of_the_others_does(
    base_directory: Path, adapter: PeftFiles, tmp_path: Path
) -> None:
    with running(small_config(base_directory, tmp_path / "data")) as server:
        mira, ola = fill(server, "mira", adapter), fill(server, "ola", adapter)
        blocks = server.engine_stats()["kv_blocks_free"]
        digests = {version.digest for version in server.hub.registry.versions("mira")}
        said, files = ola.ask("ola/imported"), [file.id for file in ola.openai.files.list()]
        receipt = erased(server, "mira")
        removed = receipt["removed"]
        assert all(removed[kind] >= 1 for kind in KINDS), removed
        assert (removed["adapters"], removed["versions"], removed["uploads"], removed["jobs"]) == (
            2,
            len(digests),
            1,
            1,
        )
        assert (receipt["owner"], receipt["status"], receipt["left_in_stores"]) == ("mira", "completed", [])
        for words in ("mira", *digests):
            assert traces_of(words, tmp_path / "data") == []
        assert server.engine_stats()["kv_blocks_free"] >= blocks
        assert server.hub.engine.erase("mira").result() == 0
        assert server.hub.grammars.erase("mira") == 0
        tiers = server.hub.engine.tiers_of(sorted(digests)).result()
        assert {*tiers} == {"disk"}, "without a store that is where the rest would be"
        with pytest.raises(openai.AuthenticationError):
            mira.openai.models.list()
        assert ola.ask("ola/imported") == said
        assert [file.id for file in ola.openai.files.list()] == files
        assert read_trace(tmp_path / "data" / "trace").adapters[0].owner == "ola"
        [shown] = server.admin.http.get("/admin/erasures").raise_for_status().json()["data"]
        assert shown == {name: value for name, value in receipt.items() if name != "owner"}
        assert server.admin.http.delete("/admin/users/mira").status_code == 404
        again = server.user(owner="mira")
        assert again.openai.files.list().data == []
    assert traces_of(SECRET.replace("my", "mira: my"), tmp_path / "data") == []


def test_answers_jobs_and_imports_under_way_end_and_leave_nothing(
    server: Server, adapter: PeftFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    mira, ola = server.user(), server.user()
    streams = [
        user.openai.completions.create(
            model=BASE, prompt="Hi", max_tokens=300, stream=True, extra_body={"ignore_eos": True}
        )
        for user in (mira, ola)
    ]
    theirs = iter(streams[0])
    next(theirs)
    job = mira.train(chat_lines(40), n_epochs=50)
    mira.job(job, "running")
    publishing, go_on = threading.Event(), threading.Event()
    publish = server.hub.registry.publish

    def slow_publish(*args: Any, **options: Any) -> Any:
        if args[0] == mira.owner:
            publishing.set()
            go_on.wait()
        return publish(*args, **options)

    monkeypatch.setattr(server.hub.registry, "publish", slow_publish)
    importing = threading.Thread(
        target=lambda: mira.http.post("/v1/adapters", data={"name": "late"}, files=adapter.upload)
    )
    importing.start()
    publishing.wait()
    receipts: list[dict[str, Any]] = []
    erasing = threading.Thread(target=lambda: receipts.append(erased(server, mira.owner)))
    erasing.start()
    with pytest.raises(openai.APIError, match="erased while the request ran"):
        list(theirs)
    assert receipts == [], "something of theirs is still being written"
    refused = server.admin.http.post("/admin/keys", json={"owner": mira.owner})
    assert (refused.status_code, "being erased" in refused.text) == (400, True)
    go_on.set()
    erasing.join()
    importing.join()
    removed = receipts[0]["removed"]
    assert (removed["requests"], removed["jobs"], removed["versions"]) == (1, 1, 1)
    assert [chunk.choices[0].finish_reason for chunk in streams[1]][-1] == "length"
    server.hub.meter.save()
    server.hub.trace.flush()
    assert traces_of(mira.owner + '"', server.data_dir / "trace") == []
    for table in ("files", "jobs", "adapters", "usage", "owed", "keys", "owners", "uploads", "metered_jobs"):
        column = "name" if table == "owners" else "owner"
        assert server.hub.database.rows(f"select * from {table} where {column} = ?", (mira.owner,)) == [], table
    ola.job(ola.train(chat_lines(), n_epochs=1), "succeeded")


def test_only_somebody_who_is_there_can_be_erased_and_not_who_erases(server: Server) -> None:
    assert server.admin.http.delete("/admin/users/nobody").status_code == 404
    assert server.admin.http.delete("/admin/users/admin").status_code == 400
    other = server.as_user("root", server.hub.keys.create("root", admin=True))
    assert other.http.delete("/admin/users/root").status_code == 400
    assert other.http.delete("/admin/users/admin").status_code == 400


def test_the_command_line_asks_before_it_erases(server: Server, user: User) -> None:
    user.upload(b"something", purpose="user_data")
    asked = run_cli("users", "erase", user.owner, user=server.admin)
    assert (asked.returncode, "--yes" in asked.stderr) == (1, True)
    assert len(user.openai.files.list().data) == 1
    done = run_cli("users", "erase", user.owner, "--yes", user=server.admin)
    assert re.search(r"^ +1 files$", done.stdout, re.MULTILINE), (done.stdout, done.stderr)
    assert (
        json.loads(run_cli("users", "erase", server.user().owner, "--yes", "--json", user=server.admin).stdout)[
            "status"
        ]
        == "completed"
    )


def test_the_command_line_writes_all_that_is_kept_of_an_owner(server: Server, user: User, tmp_path: Path) -> None:
    file = user.upload(b"something", purpose="user_data", name="a.txt")
    out = tmp_path / "new" / "all.zip"
    done = run_cli("users", "export", user.owner, str(out), user=server.admin)
    assert (done.returncode, f"Wrote {out}" in done.stdout) == (0, True), done.stderr
    assert out.stat().st_mode & 0o077 == 0, "it is for whoever wrote it alone"
    with zipfile.ZipFile(out) as archive:
        assert archive.read(f"files/{file}-a.txt") == b"something"
        assert archive.testzip() is None
    user.upload(b"more", purpose="user_data", name="b.txt")
    written = out.read_bytes()
    asked = run_cli("users", "export", user.owner, str(out), user=server.admin)
    assert (asked.returncode, "--yes" in asked.stderr, out.read_bytes()) == (1, True, written)
    assert run_cli("users", "export", user.owner, str(out), "--yes", user=server.admin).returncode == 0
    with zipfile.ZipFile(out) as archive:
        assert [name[-5:] for name in archive.namelist() if name.startswith("files/")] == ["b.txt", "a.txt"]


def test_an_export_that_fails_leaves_what_was_there_and_nothing_else(
    server: Server, user: User, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user.upload(b"x" * MIB, purpose="user_data")
    out = tmp_path / "all.zip"
    out.write_bytes(b"an older one")

    def fails(owner: str, who: User) -> str:
        done = run_cli("users", "export", owner, str(out), "--yes", user=who)
        assert done.returncode == 1
        assert [path.name for path in tmp_path.iterdir()] == ["all.zip"]
        assert out.read_bytes() == b"an older one"
        return done.stderr

    assert "There is no user 'nobody'" in fails("nobody", server.admin)
    assert "admin key" in fails(user.owner, user)

    def cut_off(export: Any) -> Iterator[Any]:
        yield "account.json", [b"{}"]
        raise RuntimeError("the server fails amid the zip")

    monkeypatch.setattr("adapterhub.api.export._Export.files", cut_off)
    assert "No answer from" in fails(user.owner, server.admin)


def test_what_could_not_be_exported_is_said(server: Server, user: User, tmp_path: Path) -> None:
    file = user.upload(b"something", purpose="user_data")
    (server.hub.config.uploads_dir / file).unlink()
    done = run_cli("users", "export", user.owner, str(tmp_path / "all.zip"), user=server.admin)
    assert (done.returncode, "1 things of" in done.stderr, "missing.json" in done.stderr) == (1, True, True)
    assert zipfile.is_zipfile(tmp_path / "all.zip")


def test_what_a_store_still_holds_is_said_and_deleted_when_it_answers_again(
    base_directory: Path, adapter: PeftFiles, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    store.mkdir()
    with running(small_config(base_directory, tmp_path / "data", store=f"file://{store}")) as server:
        user = server.user()
        user.import_adapter(adapter, "kept")
        store.rename(tmp_path / "away")
        receipt = erased(server, user.owner)
        assert receipt["left_in_stores"] == [{"store": f"file://{store}", "blocks": 1}]
        (tmp_path / "away").rename(store)
        assert len(list(store.rglob("*.block"))) == 1
        server.hub.mirror.settle()  # type: ignore[union-attr]
        assert list(store.rglob("*.block")) == []
        shown = server.admin.http.get(f"/admin/erasures/{receipt['id']}").json()
        assert (shown["left_in_stores"], shown["removed"]) == ([], receipt["removed"])


# -- kills


class Images:
    """What a kill would leave of a data directory, after each change that one thread makes."""

    def __init__(self, data_dir: Path, to: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: list[Path] = []
        self._data_dir, self._to = data_dir, to
        self._thread = threading.get_ident()
        self._watch(monkeypatch, Path, "unlink")
        self._watch(monkeypatch, Path, "rename")
        self._watch(monkeypatch, shutil, "rmtree")

    def take(self) -> None:
        if threading.get_ident() == self._thread:
            path = self._to / str(len(self.paths))
            shutil.copytree(self._data_dir, path)
            self.paths.append(path)

    def _watch(self, monkeypatch: pytest.MonkeyPatch, where: Any, name: str) -> None:
        done = getattr(where, name)

        def watched(*args: Any, **options: Any) -> Any:
            result = done(*args, **options)
            self.take()
            return result

        monkeypatch.setattr(where, name, watched)


def opened(base: Base, data_dir: Path, act: Any) -> None:
    """A server on `data_dir`, without HTTP: `act` is called in a thread once it has started."""

    async def serve() -> None:
        hub = Hub(small_config(Path("unused"), data_dir), base)
        hub.start()
        try:
            await asyncio.to_thread(act, hub)
        finally:
            await asyncio.to_thread(hub.stop)

    asyncio.run(serve())


def test_killed_after_any_change_the_next_start_takes_it_to_its_end(
    base_directory: Path, base: Base, adapter: PeftFiles, tmp_path: Path
) -> None:
    data_dir = tmp_path / "data"
    with running(small_config(base_directory, data_dir)) as server:
        fill(server, "mira", adapter)
        fill(server, "ola", adapter)
        kept = server.stored()
    images: list[Images] = []
    receipts = []

    def erase(hub: Hub) -> None:
        hub.meter.stop()  # so that nobody else writes while an image is taken
        with pytest.MonkeyPatch.context() as patch:
            images.append(Images(data_dir, tmp_path, patch))
            connection = hub.database._writer.conn
            commit = hub.database.transaction

            def transaction() -> Any:
                inner = commit()

                class Watched:
                    def __enter__(self) -> Any:
                        self.outer = not connection.in_transaction
                        return inner.__enter__()

                    def __exit__(self, *error: Any) -> Any:
                        result = inner.__exit__(*error)
                        if self.outer:
                            images[0].take()
                        return result

                return Watched()

            patch.setattr(hub.database, "transaction", transaction)
            receipts.append(hub.eraser.erase("mira"))

    opened(base, data_dir, erase)
    theirs = {name for name in kept if not (data_dir / name).exists()}
    assert theirs, "files of hers are gone"
    assert len(images[0].paths) > 15
    for image in images[0].paths:

        def check(hub: Hub) -> None:
            assert hub.erasures.unfinished() == []
            [found] = hub.erasures.all()
            same = {kind: found.removed[kind] for kind in ("keys", "files", "jobs", "events", "adapters", "versions")}
            assert same == {kind: receipts[0].removed[kind] for kind in same}
            assert hub.files.page("ola", None, 10)[0]
            assert {version.name for version in hub.registry.versions("ola")} == {"imported", "trained"}
            with pytest.raises(NotFound):
                hub.eraser.erase("mira")

        opened(base, image, check)
        assert traces_of("mira", image) == [], image
        folders = (image / "uploads", image / "blobs")
        stored = {str(path.relative_to(image)) for folder in folders for path in folder.iterdir()}
        assert stored == kept - theirs
        shutil.rmtree(image)


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.03])
def test_killed_at_any_moment_an_owner_has_all_or_is_gone_after_the_next_start(
    base_directory: Path, adapter: PeftFiles, tmp_path: Path, delay: float
) -> None:
    sizes = ("--device-bytes", "8MiB", "--kv-bytes", "8MiB")
    with process(base_directory, tmp_path / "data", *sizes) as killed:
        user = killed.start().user("mira")
        user.import_adapter(adapter, "one")
        files = {user.upload(b"text", purpose="user_data") for _ in range(20)}
        admin = killed.user("admin", (killed.data_dir / "admin.key").read_text().strip())

        def erase() -> None:
            with suppress(httpx.TransportError):
                admin.http.delete("/admin/users/mira")

        erasing = threading.Thread(target=erase)
        erasing.start()
        time.sleep(delay)  # the moment is what differs
        killed.kill()
        erasing.join()
        user = killed.start().user("mira", user.key)
        try:
            assert {file.id for file in user.openai.files.list()} == files
            assert user.ask("mira/one")
        except openai.AuthenticationError:
            assert traces_of("mira", tmp_path / "data") == []
            assert list((tmp_path / "data" / "uploads").iterdir()) == []


# -- what is handed out


def test_the_export_holds_all_that_an_owner_has_and_nothing_of_others(server: Server, adapter: PeftFiles) -> None:
    mira, ola = (fill(server, name, adapter) for name in ("export-mira", "export-ola"))
    archives = [
        mira.http.get("/v1/export").raise_for_status(),
        server.admin.http.get(f"/admin/users/{mira.owner}/export").raise_for_status(),
    ]
    assert archives[0].headers["content-disposition"] == 'attachment; filename="export-mira.zip"'
    for answer in archives:
        with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
            assert archive.testzip() is None
            content = {name: archive.read(name) for name in archive.namelist()}
        assert not any(ola.owner.encode() in each for each in content.values())
        files = {file.id: file for file in mira.openai.files.list()}
        assert {file["id"] for file in json.loads(content["files.json"])} == files.keys()
        for name, each in content.items():
            if name.startswith("files/"):
                assert each == mira.openai.files.content(name[6:35]).content
        [upload] = json.loads(content["uploads.json"])
        [part] = [each for name, each in content.items() if name.startswith(f"uploads/{upload['id']}/")]
        assert part == f"export-mira: {SECRET}".encode()
        [job] = [json.loads(each) for name, each in content.items() if name.endswith("/job.json")]
        assert job["status"] == "succeeded"
        said = [json.loads(line) for line in content[f"jobs/{job['id']}/events.jsonl"].splitlines()]
        assert said[-1]["message"] == f"Created fine-tuning job: {job['id']}"
        adapters = {each["name"]: each for each in json.loads(content["adapters.json"])}
        imported = f"adapters/imported/{adapters['imported']['current']}"
        tensors, sent = load(content[f"{imported}/adapter_model.safetensors"]), load(adapter.weights)
        assert tensors.keys() == sent.keys()
        assert all(torch.equal(tensors[name], sent[name]) for name in sent)
        assert json.loads(content[f"{imported}/adapter_config.json"]) == json.loads(adapter.config)
        for version in adapters["trained"]["versions"]:
            assert f"adapters/trained/{version['id']}/adapter_model.safetensors" in content
        rows = list(csv.DictReader(io.StringIO(content["usage.csv"].decode())))
        assert {row["adapter"] for row in rows} >= {"imported", "trained"}
        account = json.loads(content["account.json"])
        assert (account["owner"], account["quotas"], len(account["keys"])) == (mira.owner, {"jobs": 5}, 1)
        assert mira.key.encode() not in answer.content
        assert json.loads(content["missing.json"]) == {}
    assert server.admin.http.get("/admin/users/nobody/export").status_code == 404


def test_what_cannot_be_read_is_named_in_the_export(server: Server, user: User) -> None:
    file = user.upload(b"gone", purpose="user_data")
    server.hub.files.path(file).unlink()
    with zipfile.ZipFile(io.BytesIO(user.http.get("/v1/export").content)) as archive:
        assert json.loads(archive.read("missing.json")) == {file: "No such file or directory"}
    user.openai.files.delete(file)


def test_a_zip_is_made_piece_by_piece_and_is_whole() -> None:
    def large() -> Iterator[bytes]:
        for at in range(64):
            yield bytes([at]) * MIB

    content, longest = b"", 0
    for piece in stream_zip([("a", [b"first"]), ("large", large()), ("é/empty", [])]):
        content += piece
        longest = max(longest, len(piece))
    assert longest < 2 * MIB
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["a", "large", "é/empty"]
        assert archive.read("large")[-MIB:] == bytes([63]) * MIB
