"""Servers that are killed, stopped, started twice or on another base: what was acknowledged is there, and no more."""

from __future__ import annotations

import random
import resource
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from transformers import PreTrainedModel

from adapterhub.train.state import RunState
from adapterhub.train.workspace import Workspaces
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
FOREVER = {"batch_size": 1, "n_epochs": 100, "early_stopping": 0}  # with 200 lines, for as long as a test may take
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


def events(user: User, job: str) -> list[Any]:
    """The oldest first."""
    return list(user.openai.fine_tuning.jobs.list_events(job, limit=1000))[::-1]


def messages(user: User, job: str) -> list[str]:
    return [e.message for e in events(user, job)]


def steps(user: User, job: str) -> list[int]:
    """That the job has told of, in that order."""
    return [e.data["step"] for e in events(user, job) if e.type == "metrics"]


def losses(user: User, job: str) -> list[float]:
    """Of each step, as the result file says."""
    [file] = user.openai.fine_tuning.jobs.retrieve(job).result_files
    lines = user.openai.files.content(file).read().decode().splitlines()[1:]
    assert [int(line.split(",")[0]) for line in lines] == list(range(1, len(lines) + 1))
    return [float(line.split(",")[1]) for line in lines]


def checkpoints(user: User, job: str) -> list[int]:
    """The steps of those that are kept, the last first."""
    return [c.step_number for c in user.openai.fine_tuning.jobs.checkpoints.list(job)]


def saved_step(server: Process, job: str, after: int) -> int:
    """That the job would go on from, were the server killed now; 0 while none later than `after` is on disk."""
    try:
        step = RunState.load(Workspaces(server.data_dir / "jobs").of(job).state).step
    except FileNotFoundError:
        return 0
    return step if step > after else 0


def restarts(user: User, job: str, count: int) -> list[int]:
    """The steps after which the job has gone on; empty while that are fewer than `count`."""
    begin = "The server restarted: the job goes on after step "
    found = [int(m.removeprefix(begin)) for m in messages(user, job) if m.startswith(begin)]
    return found if len(found) >= count else []


def published(user: User, name: str) -> list[str]:
    """The models that jobs have made of that name."""
    names = [m.id for m in user.openai.models.list() if f":{name}:" in m.id]
    return [name for name in names if ":ckpt-step-" not in name]


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


def test_a_job_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(
    killed: Process, adapter: PeftFiles
) -> None:
    user = killed.user("runs")
    user.import_adapter(adapter, "before")
    said = user.ask(f"{user.owner}/before")
    lengths = {"batch_size": 1, "n_epochs": 8, "held_out": 0, "keep_checkpoints": 9}
    undisturbed = user.train(chat_lines(100), suffix="undisturbed", **lengths)
    user.job(undisturbed, "succeeded")
    job = user.train(chat_lines(100), suffix="mine", **lengths)
    saved = 0
    for count in (1, 2):
        saved = eventually(partial(saved_step, killed, job, saved))
        user = again(killed, user)
        assert user.ask(f"{user.owner}/before") == said
        [*_, gone_on] = eventually(partial(restarts, user, job, count))
        assert gone_on >= saved
    done = user.job(job, "succeeded")
    told = messages(user, job)
    assert len(restarts(user, job, 2)) == 2
    assert told.count("Files validated, moving job to queued state") == 1
    assert checkpoints(user, job) == checkpoints(user, undisturbed) == [700, 600, 500, 400, 300, 200, 100]
    assert losses(user, job) == pytest.approx(losses(user, undisturbed), abs=1e-3, rel=1e-3)
    assert done.trained_tokens == user.openai.fine_tuning.jobs.retrieve(undisturbed).trained_tokens
    assert published(user, "mine") == [done.fine_tuned_model]
    assert list((killed.data_dir / "jobs").iterdir()) == []


def test_a_job_that_waits_needs_nothing_more_after_a_kill(killed: Process) -> None:
    user = killed.user("waits")
    blocking = [user.train(chat_lines(200), **FOREVER) for _ in range(4)]  # as many as run for one owner
    for job in blocking:
        user.job(job, "running")
    waiting = user.train(chat_lines(), suffix="mine", n_epochs=1)
    user.job(waiting, "queued")
    user.openai.files.delete(user.openai.fine_tuning.jobs.retrieve(waiting).training_file)
    user = again(killed, user)
    assert {user.openai.fine_tuning.jobs.retrieve(job).status for job in blocking} == {"running"}
    assert user.openai.fine_tuning.jobs.retrieve(waiting).status == "queued"
    for job in blocking:
        user.openai.fine_tuning.jobs.cancel(job)
    user.job(waiting, "succeeded")
    assert messages(user, waiting).count("Files validated, moving job to queued state") == 1


def test_a_job_that_was_queued_when_the_server_was_killed_starts_although_nothing_else_happens(killed: Process) -> None:
    user = killed.user("queued")
    job = user.train(chat_lines(60), batch_size=1, n_epochs=4)
    eventually(lambda: steps(user, job))
    user.openai.fine_tuning.jobs.pause(job)
    eventually(lambda: killed.engine_stats()["training"]["runs"] == 0)
    killed.kill()
    with closing(sqlite3.connect(killed.data_dir / "hub.db")) as database:  # as between its validation and its start
        database.execute("update jobs set status = 'queued' where id = ?", (job,))
        database.commit()
    user = killed.start().user(user.owner, user.key)
    user.job(job, "succeeded")


def test_a_paused_job_stays_paused_over_a_kill_and_goes_on(killed: Process) -> None:
    user = killed.user("pauses")
    job = user.train(chat_lines(60), batch_size=1, n_epochs=4, early_stopping=0)
    eventually(lambda: steps(user, job))
    user.openai.fine_tuning.jobs.pause(job)
    eventually(lambda: killed.engine_stats()["training"]["runs"] == 0)
    user = again(killed, user)
    assert user.openai.fine_tuning.jobs.retrieve(job).status == "paused"
    user.openai.fine_tuning.jobs.resume(job)
    user.job(job, "succeeded")
    assert steps(user, job) == list(range(1, 241))


def test_killed_at_any_moment_jobs_end_with_one_model_each(killed: Process) -> None:
    user = killed.user("often")
    files = {p.name for p in (killed.data_dir / "uploads").iterdir()}
    jobs: list[str] = []
    rng = random.Random(5)
    for round_ in range(3):
        jobs += [user.train(chat_lines(), suffix=f"n{round_}-{i}", n_epochs=4) for i in range(3)]
        time.sleep(rng.uniform(0, 1.5))
        user = again(killed, user)
    for job in jobs:
        done = user.job(job, "succeeded")
        assert published(user, done.user_provided_suffix) == [done.fine_tuned_model]
        assert len(losses(user, job)) == 12
        assert messages(user, job).count("The job has successfully completed") == 1
    added = {p.name for p in (killed.data_dir / "uploads").iterdir()} - files
    assert added == {f.id for f in user.openai.files.list()}
    assert len(added) == 2 * len(jobs)
    eventually(lambda: not list((killed.data_dir / "jobs").iterdir()))


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
    size = max(p.stat().st_size for p in killed.data_dir.glob("hub.db*")) + 64 * 1024
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
    job = user.train(chat_lines(200), suffix="mine", batch_size=1, n_epochs=1, held_out=0)
    eventually(lambda: steps(user, job))
    with user.openai.chat.completions.create(model=BASE, messages=HELLO, stream=True) as stream:
        assert next(iter(stream))
        started = time.monotonic()
        assert killed.stop() == 0
        assert time.monotonic() - started < 30, "5 s of grace, and a slow machine"
    assert "Traceback" not in killed.logged or "graceful shutdown exceeded" in killed.logged, "the stream was cut off"
    user = killed.start().user(user.owner, user.key)
    user.job(job, "succeeded")
    assert steps(user, job) == list(range(1, 201)), "none was lost, and none done twice"


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
    blocking = user.train(chat_lines(200), **FOREVER)
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
    job = user.train(chat_lines(200), **FOREVER)  # so that the answer takes its time
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
