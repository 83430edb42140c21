"""Servers that are killed, stopped, started twice or on another base: what was acknowledged is there, and no more."""

from __future__ import annotations

import random
import resource
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from transformers import PreTrainedModel

from tests.serving import (
    BASE,
    CONTEXT,
    SECONDS,
    PeftFiles,
    Process,
    Server,
    User,
    chat_lines,
    eventually,
    process,
    run_cli,
    save_base,
)

SIZES = ("--device-bytes", "8MiB", "--kv-bytes", "8MiB")
HELLO: list[Any] = [{"role": "user", "content": "Hello there"}]


@pytest.fixture(scope="module")
def one_server(base_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with process(base_directory, tmp_path_factory.mktemp("killed") / "data", *SIZES) as made:
        yield made


@pytest.fixture
def killed(one_server: Process) -> Process:
    """A server that runs, and that a test may kill; its data goes on from test to test."""
    return one_server if one_server.pid else one_server.start()


def again(killed: Process, user: User) -> User:
    """Kills the server, starts it again, and gives the same owner with the same key."""
    killed.kill()
    return killed.start().user(user.owner, user.key)


def stored(server: Process) -> set[Path]:
    return {p for folder in ("uploads", "blobs") for p in (server.data_dir / folder).iterdir()}


# -- kill -9


def test_a_file_is_there_after_a_kill_right_after_its_upload(killed: Process) -> None:
    user = killed.user("uploads")
    content = chat_lines(500)
    identity = user.upload(content)
    user = again(killed, user)
    assert user.openai.files.content(identity).read() == content
    assert [f.id for f in user.openai.files.list()] == [identity]


def test_a_job_is_there_after_a_kill_right_after_its_creation_and_succeeds(killed: Process) -> None:
    user = killed.user("creates")
    job = user.train(chat_lines(), suffix="mine", n_epochs=2)
    user = again(killed, user)
    assert [j.id for j in user.openai.fine_tuning.jobs.list()] == [job]
    done = user.job(job, "succeeded")
    assert user.ask(f"{user.owner}/mine") == user.ask(done.fine_tuned_model)


def test_a_running_job_starts_again_after_a_kill_and_what_there_was_still_serves(
    killed: Process, adapter: PeftFiles
) -> None:
    user = killed.user("runs")
    user.import_adapter(adapter, "before")
    said = user.ask(f"{user.owner}/before")
    job = user.train(chat_lines(40), suffix="mine", batch_size=1, n_epochs=4)
    waiting = user.train(chat_lines(), suffix="next", n_epochs=1)
    eventually(lambda: user.job(job, "running").trained_tokens)
    user = again(killed, user)
    assert user.ask(f"{user.owner}/before") == said
    done = user.job(job, "succeeded")
    messages = [e.message for e in user.openai.fine_tuning.jobs.list_events(job, limit=1000)][::-1]
    restarted = messages.index("The server restarted while the job ran; it starts again from the first step")
    after = messages[restarted + 1 :]
    assert after[0] == "Fine-tuning job started"
    assert [m.partition(":")[0] for m in after if m.startswith("Step ")] == [f"Step {i}/160" for i in range(1, 161)]
    assert [m.id for m in user.openai.models.list() if ":mine:" in m.id] == [done.fine_tuned_model]
    user.job(waiting, "succeeded")


def test_half_an_import_leaves_nothing(killed: Process, adapter: PeftFiles) -> None:
    user = killed.user("half")
    before = stored(killed)
    whole = httpx.Request("POST", f"{user.url}/v1/adapters", data={"name": "mine"}, files=adapter.upload).read()
    kind = httpx.Request("POST", user.url, files=adapter.upload).headers["content-type"].partition("boundary=")[0]
    boundary = whole[2 : whole.index(b"\r\n")]
    where = urlsplit(user.url)
    head = f"POST /v1/adapters HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {user.key}\r\ncontent-type: {kind}boundary="
    with socket.create_connection((where.hostname, where.port)) as connection:
        connection.sendall(head.encode() + boundary + b"\r\ncontent-length: %d\r\n\r\n" % len(whole))
        connection.sendall(whole[: len(whole) // 2])
        eventually(lambda: user.http.get("/healthz").is_success)
        user = again(killed, user)
    assert user.http.get("/v1/adapters").json()["data"] == []
    assert stored(killed) == before
    assert user.import_adapter(adapter, "mine")["versions"][0]["number"] == 1


def test_leftovers_that_no_row_names_are_removed_at_the_next_start(killed: Process) -> None:
    user = killed.user("leaves")
    kept = user.upload(b"keep me", purpose="user_data")
    killed.kill()
    before = stored(killed)
    for name in ("uploads/file-unnamed", "uploads/file-x.12.partial", f"blobs/{'0' * 64}.block", "blobs/y.34.partial"):
        (killed.data_dir / name).write_bytes(b"left behind")
    user = killed.start().user(user.owner, user.key)
    assert stored(killed) == before
    assert user.openai.files.content(kept).read() == b"keep me"


def test_killed_amid_much_work_nothing_that_was_acknowledged_is_lost(
    killed: Process, base_model: PreTrainedModel, tmp_path: Path
) -> None:
    """A client uploads, imports and deletes as fast as it can; each time the server is killed somewhere else."""
    variants = [PeftFiles(base_model, tmp_path / str(seed), seed=seed) for seed in (61, 62, 63)]
    user = killed.user("works")
    work = _Work(user, variants)
    for seed in (1, 2):
        work.user = user
        thread = threading.Thread(target=work.run, args=(seed,))
        thread.start()
        time.sleep(random.Random(seed).uniform(0.5, 1.5))
        killed.kill()
        thread.join(SECONDS)
        user = killed.start().user(user.owner, user.key)
        work.check(user)
    found = run_cli("doctor", "--data-dir", str(killed.data_dir))
    assert found.returncode == 0, found.stdout


class _Work:
    """What a client has done, as far as it was told so; `unsure` is what it asked for when the server died."""

    def __init__(self, user: User, variants: list[PeftFiles]) -> None:
        self.user = user
        self.variants = variants
        self.files: dict[str, bytes] = {}
        self.current: dict[str, int] = {}  # name -> the variant it must say
        self.unsure: set[str] = set()
        self.said: dict[int, str] = {}

    def run(self, seed: int) -> None:
        rng = random.Random(seed)
        with suppress(httpx.TransportError, openai.APIConnectionError):
            while True:
                [self._upload, self._import, self._import, self._delete_file, self._delete_name][rng.randrange(5)](rng)

    def _upload(self, rng: random.Random) -> None:
        content = rng.randbytes(rng.randrange(1, 200_000))
        self.files[self.user.upload(content, purpose="user_data")] = content

    def _import(self, rng: random.Random) -> None:
        name, variant = f"n{rng.randrange(4)}", rng.randrange(3)
        self.unsure = {name}
        self.user.import_adapter(self.variants[variant], name)
        self.current[name] = variant
        self.unsure = set()

    def _delete_file(self, rng: random.Random) -> None:
        if self.files:
            identity = rng.choice(list(self.files))
            del self.files[identity]
            self.unsure = {identity}
            self.user.openai.files.delete(identity)
            self.unsure = set()

    def _delete_name(self, rng: random.Random) -> None:
        if self.current:
            name = rng.choice(list(self.current))
            self.unsure = {name}
            self.user.openai.models.delete(f"{self.user.owner}/{name}")
            del self.current[name]
            self.unsure = set()

    def check(self, user: User) -> None:
        found = {f.id: user.openai.files.content(f.id).read() for f in user.openai.files.list()}
        for identity, content in self.files.items():
            assert found.pop(identity) == content
        assert len(found) <= 1, "an upload, or a deletion, that was under way may have been done"
        names = {a["name"] for a in user.http.get("/v1/adapters").json()["data"]}
        assert names - self.unsure == self.current.keys() - self.unsure
        for name in names:
            answer = user.ask(f"{user.owner}/{name}")
            if name not in self.unsure:
                assert answer == self.said.setdefault(self.current[name], answer)
        self.files.update(found)
        for name in self.unsure:
            self.current.pop(name, None)
            with suppress(openai.NotFoundError):
                user.openai.models.delete(f"{user.owner}/{name}")
        self.unsure = set()


# -- keys


def test_keys_work_at_once_and_after_a_restart_and_so_does_the_admins(killed: Process) -> None:
    user = killed.user("keys", killed.create_key("keys"))
    assert user.openai.models.list().data
    second = killed.user("keys")
    second.upload(b"x", purpose="user_data")
    assert len(user.openai.files.list().data) == 1, "two keys of one owner"
    operator = killed.user("operator", killed.create_key("operator", "--admin"))
    assert operator.http.get("/admin/tiers").status_code == 200
    first_admin = (killed.data_dir / "admin.key").read_text()
    again(killed, user)
    for owner, key, status in (("keys", user.key, 403), ("keys", second.key, 403), ("operator", operator.key, 200)):
        assert killed.user(owner, key).http.get("/admin/tiers").status_code == status
    assert (killed.data_dir / "admin.key").read_text() == first_admin
    assert killed.engine_stats()["running"] == 0


def test_what_is_stored_is_for_nobody_elses_eyes(killed: Process) -> None:
    killed.user("private").upload(b"x", purpose="user_data")
    for name in (".", "uploads", "blobs"):
        assert (killed.data_dir / name).stat().st_mode & 0o077 == 0, name
    for name in ("hub.db", "admin.key"):
        assert (killed.data_dir / name).stat().st_mode & 0o077 == 0, name


# -- full disks


def test_uploads_to_a_full_disk_are_refused_and_leave_nothing(killed: Process, adapter: PeftFiles) -> None:
    """The process may write no file beyond a size: what the system then says is what it says of a full disk."""
    user = killed.user("full")
    before = stored(killed)
    size = max(p.stat().st_size for p in killed.data_dir.iterdir() if p.is_file()) + 64 * 1024
    assert killed.pid is not None
    unlimited = resource.prlimit(killed.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    for content in (b"x" * (size + 1), b"x" * (size + 2 * 1024**2)):  # the second does not fit into memory either
        form = {"data": {"purpose": "user_data"}, "files": {"file": ("a", content)}}
        answer = user.http.post("/v1/files", **form)  # type: ignore[arg-type]
        assert answer.status_code == 507, answer.text
        assert answer.json()["error"]["code"] == "storage_full"
        assert stored(killed) == before
    assert user.openai.files.list().data == []
    assert user.ask(BASE)
    resource.prlimit(killed.pid, resource.RLIMIT_FSIZE, unlimited)
    user.upload(content, purpose="user_data")


# -- stopping


def test_ctrl_c_ends_the_server_within_seconds_amid_a_stream_and_a_job(killed: Process) -> None:
    user = killed.user("stops")
    job = user.train(chat_lines(200), suffix="mine", batch_size=1, n_epochs=2)
    user.job(job, "running")
    with user.openai.chat.completions.create(model=BASE, messages=HELLO, stream=True) as stream:
        assert next(iter(stream))
        started = time.monotonic()
        assert killed.stop() == 0
        assert time.monotonic() - started < 30, "5 s of grace, and a slow machine"
    assert "Traceback" not in killed.logged
    user = killed.start().user(user.owner, user.key)
    user.job(job, "running")
    user.openai.fine_tuning.jobs.cancel(job)


def test_ctrl_c_does_not_wait_for_a_large_file_to_be_read(killed: Process) -> None:
    user = killed.user("reads")
    job = user.train(chat_lines(400_000), max_steps=1)
    assert user.openai.fine_tuning.jobs.retrieve(job).status == "validating_files"
    started = time.monotonic()
    assert killed.stop() == 0
    assert time.monotonic() - started < 15, "it takes half a minute to read"
    user = killed.start().user(user.owner, user.key)
    assert user.openai.fine_tuning.jobs.cancel(job).status == "cancelled"
    user.job(user.train(chat_lines(), n_epochs=1), "succeeded")


def test_a_second_server_on_the_same_data_is_refused_in_one_line(killed: Process) -> None:
    second = subprocess.run(killed.command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert second.returncode == 1
    assert second.stderr == f"error: Another server is using {killed.data_dir}. Stop it, or give --data-dir.\n"
    assert killed.user("still").ask(BASE)


# -- another base


def test_a_server_with_another_base_refuses_what_was_made_for_the_first(
    killed: Process, adapter: PeftFiles, tmp_path: Path
) -> None:
    user = killed.user("moves")
    version = user.import_adapter(adapter, "mine")["versions"][0]["model"]
    said = user.ask(version)
    blocking = user.train(chat_lines(200), batch_size=1, n_epochs=100)
    waiting = user.train(chat_lines(), suffix="later")
    user.job(blocking, "running")
    killed.kill()
    other = save_base(tmp_path / "other", seed=9)
    with process(other, killed.data_dir, *SIZES) as moved:
        user = moved.start().user(user.owner, user.key)
        assert [m.id for m in user.openai.models.list()] == ["other", f"{user.owner}/mine", version]
        for name in (version, f"{user.owner}/mine"):
            with pytest.raises(openai.BadRequestError, match=f"made for base {BASE}") as refused:
                user.ask(name)
            assert (refused.value.code, refused.value.param) == ("wrong_base", "model")
        assert user.ask("other")
        for job in (blocking, waiting):
            failed = user.job(job, "failed")
            assert failed.error.code == "wrong_base"
            assert "Create the job again" in failed.error.message
        archive = user.http.get(f"/v1/adapters/{user.http.get('/v1/adapters').json()['data'][0]['id']}/download")
        assert archive.is_success, "what is one's own can be taken away"
        user.job(user.train(chat_lines(), suffix="mine", n_epochs=1, model="other"), "succeeded")
        assert user.ask(f"{user.owner}/mine")
        assert moved.stop() == 0
    user = killed.start().user(user.owner, user.key)
    assert user.ask(version) == said
    with pytest.raises(openai.BadRequestError, match="made for base other"):
        user.ask(f"{user.owner}/mine")


# -- clients that go away


@pytest.mark.parametrize(
    "options",
    [{}, {"n": 4}, {"stream": True}, {"stream": True, "n": 8, "logprobs": True, "top_logprobs": 20}],
    ids=["whole", "several", "stream", "more than it reads"],
)
def test_a_client_that_goes_away_frees_its_place(
    server: Server, user: User, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    job = user.train(chat_lines(200), batch_size=1, n_epochs=100)  # so that the answer takes its time
    user.job(job, "running")
    before = server.engine_stats()["tokens"]
    answers = options.get("n", 1)
    body = {"model": BASE, "messages": HELLO, "ignore_eos": True, **options}
    content = httpx.Request("POST", server.url, json=body).content
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {user.key}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    where = urlsplit(server.url)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((where.hostname, where.port))
        connection.sendall(head.encode() + content)
        if "stream" in options:
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        eventually(lambda: server.engine_stats()["tokens"] > before + 20 * answers)
    stats = eventually(lambda: (s := server.engine_stats())["running"] == s["waiting"] == 0 and s)
    assert stats["tokens"] - before < answers * (CONTEXT - 100), "it was not generated to its end"
    user.openai.fine_tuning.jobs.cancel(job)
    assert caplog.text == ""
