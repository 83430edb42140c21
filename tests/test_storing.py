"""Requests that wait for an object store that hangs, and those that do not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapterhub.api import storing
from adapterhub.swap.store import Store
from tests.serving import BASE, SECONDS, PeftFiles, Server, chat_lines, eventually, running, small_config
from tests.test_disk import FaultyFS


class Hanging:
    """A store on which uploads, downloads, or both wait until `go`."""

    def __init__(self) -> None:
        self.fs, self.go = FaultyFS(), threading.Event()
        self.asked = threading.Semaphore(0)

    def hang(self, *calls: str) -> None:
        def wait(call: str) -> None:
            if call in calls:
                self.asked.release()
                assert self.go.wait(SECONDS)

        self.fs.fault = wait

    def begun(self, count: int) -> None:
        for _ in range(count):
            assert self.asked.acquire(timeout=SECONDS)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hanging]:
    made = Hanging()
    monkeypatch.setattr(Store, "open", lambda *_: Store(made.fs, "/bucket/prefix", "faulty://bucket/prefix"))
    yield made
    made.go.set()


@pytest.fixture
def far_server(base_directory: Path, tmp_path: Path, store: Hanging) -> Iterator[Server]:
    with running(small_config(base_directory, tmp_path / "data", store="faulty://bucket/prefix")) as started:
        yield started
        store.go.set()


def refused(answer: httpx.Response) -> None:
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable"), answer.text
    assert int(answer.headers["retry-after"]) > 0


def test_a_store_that_hangs_on_uploads_holds_up_nobody_else(
    far_server: Server, store: Hanging, adapter: PeftFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storing, "MAX_WAITING", 40)  # with those that are begun, more than there are HTTP workers
    users = [far_server.user() for _ in range(2)]  # one alone may not send so much at once
    user = users[0]
    near, _ = (one.import_adapter(adapter, "near") for one in users)
    file = user.upload(chat_lines())
    store.hang("put")

    def attempt(at: int) -> httpx.Response:
        return users[at % 2].http.post("/v1/adapters", data={"name": f"a{at}"}, files=adapter.upload)

    with ThreadPoolExecutor(60) as pool:
        answers = [pool.submit(attempt, at) for at in range(60)]
        waiting = far_server.hub.storing._threads
        eventually(lambda: sum(answer.done() for answer in answers) == 60 - storing.THREADS - 40)
        store.begun(2)  # the others wait for the same block, which is their owner's of the same numbers
        assert waiting.waiting == 40
        early = [answer.result() for answer in answers if answer.done()]
        for answer in early:
            refused(answer)
        assert user.http.get("/healthz").status_code == 200
        assert [a["id"] for a in user.http.get("/v1/adapters").raise_for_status().json()["data"]] == [near["id"]]
        assert [f.id for f in user.openai.files.list()] == [file]
        assert user.ask(f"{user.owner}/near")
        job = user.openai.fine_tuning.jobs.create(model=BASE, training_file=file)
        user.openai.fine_tuning.jobs.cancel(job.id)
        refused(attempt(99))
        store.go.set()
        statuses = [answer.result().status_code for answer in answers]
    assert statuses.count(200) == storing.THREADS + 40
    assert sum(len(one.http.get("/v1/adapters").json()["data"]) for one in users) == 2 + storing.THREADS + 40


def test_who_waits_for_a_thread_for_too_long_is_told_and_nothing_has_changed(
    far_server: Server, store: Hanging, adapter: PeftFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storing, "PATIENCE_SECONDS", 0.05)
    user = far_server.user()
    store.hang("put")

    def attempt(name: str) -> httpx.Response:
        return user.http.post("/v1/adapters", data={"name": name}, files=adapter.upload)

    with ThreadPoolExecutor(storing.THREADS) as pool:
        first = [pool.submit(attempt, f"a{at}") for at in range(storing.THREADS)]
        store.begun(1)
        eventually(lambda: len(far_server.hub.storing._threads._threads) == storing.THREADS)
        eventually(lambda: not far_server.hub.storing._threads.waiting)
        refused(attempt("late"))
        store.go.set()
        assert {answer.result().status_code for answer in first} == {200}, "those that had begun go on"
    names = {a["name"] for a in user.http.get("/v1/adapters").json()["data"]}
    assert names == {f"a{at}" for at in range(storing.THREADS)}


@pytest.mark.parametrize("what", ["download", "export", "train further"])
def test_a_store_that_hangs_on_downloads_holds_up_nobody_else(
    far_server: Server, store: Hanging, adapter: PeftFiles, what: str
) -> None:
    user = far_server.user()
    far, file = user.import_adapter(adapter, "far"), user.upload(chat_lines())
    far_server.hub.disk.remove(far_server.hub.registry.adapter(None, far["id"])[0].digest)
    store.hang("get")
    ask: dict[str, Callable[[], Any]] = {
        "download": lambda: user.http.get(f"/v1/adapters/{far['id']}/download"),
        "export": lambda: user.http.get("/v1/export"),
        "train further": lambda: user.http.post(
            "/v1/fine_tuning/jobs", json={"model": f"{user.owner}/far", "training_file": file}
        ),
    }
    with ThreadPoolExecutor(50) as pool:
        answers = [pool.submit(ask[what]) for _ in range(50)]
        store.begun(1)
        eventually(lambda: far_server.hub.storing._threads.waiting >= 50 - storing.THREADS)
        assert user.http.get("/v1/adapters").status_code == 200
        assert user.http.get("/healthz").status_code == 200
        store.go.set()
        assert {answer.result().status_code for answer in answers} <= {200, 429}
