"""Quotas: buckets against exact fractions, limits that change on a running server, and what an owner over one hears."""

from __future__ import annotations

import itertools
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.api.tenancy import rates as tenancy_rates
from adapterhub.api.tenancy.buckets import MINUTE, SECOND, Bucket
from adapterhub.api.tenancy.quotas import Limits, Quotas
from adapterhub.api.tenancy.rates import USUAL_ANSWER, Rates
from adapterhub.api.tenancy.room import MAX_BODIES, Room
from adapterhub.api.tenancy.terms import EVERYBODY
from adapterhub.config import MIB
from adapterhub.errors import BadRequest, RateLimited, TooManyRequests
from adapterhub.swap.database import Database
from adapterhub.train.job import Job
from adapterhub.train.news import Trained
from adapterhub.train.publish import Publisher
from tests.serving import BASE, SECONDS, PeftFiles, Server, User, chat_lines, eventually, run_cli

RANK_4: Any = {"rank": 4}
NO_CHECKPOINTS = {"keep_checkpoints": 0}
HELLO: list[Any] = [{"role": "user", "content": "Hello there"}]


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(tmp_path / "hub.db")
    yield opened
    opened.close()


class Clock:
    """Time that goes on when it is told to, in nanoseconds; since the epoch as well as for measuring."""

    def __init__(self) -> None:
        self.now = 1_700_000_000 * SECOND

    def __call__(self) -> int:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += round(seconds * SECOND)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(tenancy_rates.time, "time_ns", made)
    return made


# -- buckets

STEPS = st.lists(st.tuples(st.integers(0, 90 * SECOND), st.integers(1, 200)), max_size=60)


@given(steps=STEPS, limit=st.integers(1, 150))
def test_a_bucket_is_exact(steps: list[tuple[int, int]], limit: int) -> None:
    """Against fractions: what is owed shrinks by the limit every minute, and is never less than nothing."""
    bucket, owed, now = Bucket(0), Fraction(0), 0
    for passed, amount in steps:
        now += passed
        owed = max(Fraction(0), owed - Fraction(limit * passed, MINUTE))
        assert bucket.left(limit, now) == max(0, limit - owed) // 1
        assert bucket.until_full(limit, now) == -(-owed * MINUTE // limit)
        if amount <= limit:
            wait = bucket.wait(amount, limit, now)
            assert wait == max(0, -(-(owed + amount - limit) * MINUTE // limit))
        if amount % 3:  # others take it although there is not as much
            bucket.take(amount, limit, now)
            owed += amount


@given(steps=STEPS, limit=st.integers(1, 150))
def test_nobody_gets_more_than_the_limit_of_each_minute_and_one_minutes_worth(
    steps: list[tuple[int, int]], limit: int
) -> None:
    bucket, taken, now = Bucket(0), 0, 0
    for passed, amount in steps:
        now += passed
        if amount <= limit and not bucket.wait(amount, limit, now):
            bucket.take(amount, limit, now)
            taken += amount
        assert taken * MINUTE <= limit * (MINUTE + now)


@given(limit=st.integers(1, 100), waits=st.lists(st.integers(1, 10**9), min_size=50, max_size=50))
def test_a_bucket_that_is_looked_at_often_does_not_drift(limit: int, waits: list[int]) -> None:
    often, once = Bucket(0), Bucket(0)
    for bucket in (often, once):
        bucket.take(limit, limit, 0)
    now = 0
    for wait in waits:
        now += wait
        often.left(limit, now)
    assert often.until_full(limit, now) == once.until_full(limit, now)


def test_who_waits_as_long_as_they_are_told_gets_it_and_no_sooner() -> None:
    bucket = Bucket(0)
    bucket.take(7, 7, 0)
    wait = bucket.wait(3, 7, 0)
    assert bucket.wait(3, 7, wait - 1) == 1
    assert bucket.wait(3, 7, wait) == 0


# -- quotas


def test_an_owners_limits_go_before_everybodys_and_those_before_the_defaults(database: Database) -> None:
    quotas = Quotas(database, Limits(jobs=4, adapters=10))
    quotas.change(EVERYBODY, {"tokens_per_minute": 1000, "jobs": 3})
    quotas.change("mira", {"jobs": None})
    quotas.change("mira", {"tokens_per_minute": 5})
    assert quotas.of("mira") == Limits(jobs=None, adapters=10, tokens_per_minute=5)
    assert quotas.of("teo") == Limits(jobs=3, adapters=10, tokens_per_minute=1000)
    again = Quotas(database, Limits(jobs=4, adapters=11))
    assert again.of("mira") == Limits(jobs=None, adapters=11, tokens_per_minute=5), "after a restart"
    assert again.given() == {EVERYBODY: {"tokens_per_minute": 1000, "jobs": 3}, "mira": again.given()["mira"]}
    assert quotas.forget("mira") == 2
    assert quotas.of("mira") == quotas.of("teo")
    with pytest.raises(BadRequest, match="is no quota"):
        quotas.change("mira", {"cats": 1})
    with pytest.raises(BadRequest, match="not a valid owner"):
        quotas.change("a b", {"jobs": 1})


# -- rates


def test_requests_and_tokens_are_let_in_up_to_a_minutes_worth_and_then_as_they_come_back(
    database: Database, clock: Clock
) -> None:
    rates = Rates(database, Quotas(database, Limits(requests_per_minute=3, tokens_per_minute=600)), clock)
    for _ in range(3):
        rates.admit("mira", 10)
    with pytest.raises(RateLimited, match=r"3 requests per minute\. Try again in 20 s") as caught:
        rates.admit("mira", 10)
    assert caught.value.headers == {
        "retry-after": "20",
        "x-ratelimit-limit-requests": "3",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "1m0s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "570",
        "x-ratelimit-reset-tokens": "3s",
    }
    rates.admit("teo", 10)
    clock.sleep(20)
    rates.admit("mira", 600)
    clock.sleep(20)
    with pytest.raises(RateLimited, match=r"600 tokens per minute\. Try again in 40 s"):
        rates.admit("mira", 600)


def test_the_first_request_may_be_for_all_of_a_minute(database: Database) -> None:
    quotas = Quotas(database, Limits(requests_per_minute=1, tokens_per_minute=600))
    rates = Rates(database, quotas, itertools.count().__next__)  # a clock that goes on whenever it is looked at
    rates.admit("mira", 600)


def test_a_request_that_can_never_be_let_in_is_told_so_and_takes_nothing(database: Database, clock: Clock) -> None:
    rates = Rates(database, Quotas(database, Limits(tokens_per_minute=100)), clock)
    with pytest.raises(RateLimited, match="for 101 tokens") as caught:
        rates.admit("mira", 101)
    assert caught.value.headers["x-should-retry"] == "false"
    rates.admit("mira", 100)


def test_what_was_set_aside_and_not_used_comes_back_and_what_was_used_beyond_is_owed(
    database: Database, clock: Clock
) -> None:
    rates = Rates(database, Quotas(database, Limits(tokens_per_minute=600)), clock)
    rates.settle(rates.admit("mira", 500), 100)
    assert rates.headers("mira")["x-ratelimit-remaining-tokens"] == "500"
    rates.settle(rates.admit("mira", 500), 1700)
    assert rates.headers("mira")["x-ratelimit-reset-tokens"] == "3m0s"
    with pytest.raises(RateLimited, match="in 121 s"):
        rates.admit("mira", 1 + 9)
    clock.sleep(121)
    rates.admit("mira", 10)


def test_a_restart_neither_gives_nor_takes(database: Database, clock: Clock) -> None:
    quotas = Quotas(database, Limits(requests_per_minute=60, tokens_per_minute=600))
    before = Rates(database, quotas, clock)
    for _ in range(40):
        before.admit("mira", 15)
    clock.sleep(1)
    before.save()
    clock.sleep(9)
    after = Rates(database, quotas, clock)
    assert after.headers("mira") == before.headers("mira")
    assert after.headers("mira")["x-ratelimit-remaining-tokens"] == "100"
    before.erase("mira")
    assert Rates(database, quotas, clock).headers("mira")["x-ratelimit-remaining-tokens"] == "600"


def test_a_limit_that_changes_counts_what_was_used(database: Database, clock: Clock) -> None:
    quotas = Quotas(database, Limits(tokens_per_minute=600))
    rates = Rates(database, quotas, clock)
    rates.admit("mira", 500)
    quotas.change("mira", {"tokens_per_minute": 1000})
    assert rates.headers("mira")["x-ratelimit-remaining-tokens"] == "500"
    quotas.change("mira", {"tokens_per_minute": None})
    assert rates.headers("mira") == {}
    rates.admit("mira", 10**9)


# -- over HTTP


def set_quota(server: Server, owner: str, **limits: int | None) -> None:
    server.admin.http.patch(f"/admin/quotas/{owner}", json=limits).raise_for_status()


def limited(answer: httpx.Response, code: str) -> str:
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, code), answer.text
    assert int(answer.headers["retry-after"]) > 0
    return answer.json()["error"]["message"]


def test_an_owner_over_their_requests_is_told_when_to_come_back_and_others_are_not(server: Server, user: User) -> None:
    set_quota(server, user.owner, requests_per_minute=2)
    for left in ("1", "0"):
        raw = user.openai.chat.completions.with_raw_response.create(model=BASE, messages=HELLO, max_tokens=1)
        assert raw.headers["x-ratelimit-limit-requests"] == "2"
        assert raw.headers["x-ratelimit-remaining-requests"] == left
        assert "x-ratelimit-limit-tokens" not in raw.headers
    with pytest.raises(openai.RateLimitError) as caught:
        user.ask(BASE)
    assert "You have used up your 2 requests per minute" in limited(caught.value.response, "rate_limit_exceeded")
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 30
    with pytest.raises(openai.RateLimitError):
        user.openai.completions.create(model=BASE, prompt="Hello", stream=True)
    assert user.openai.models.list().data, "what is no inference goes on"
    assert server.user().ask(BASE) is not None
    set_quota(server, user.owner, requests_per_minute=None)
    assert user.ask(BASE) is not None


def test_tokens_count_as_the_answer_says_they_were_used(server: Server, user: User) -> None:
    set_quota(server, user.owner, tokens_per_minute=100_000)

    def left() -> int:
        raw = user.openai.completions.with_raw_response.create(model=BASE, prompt=[5, 6, 7], max_tokens=1)
        return int(raw.headers["x-ratelimit-remaining-tokens"])

    before = left()
    used = user.openai.chat.completions.create(model=BASE, messages=HELLO, max_tokens=300, n=2).usage
    assert used is not None
    # less what came back in the time that has passed, which takes a minute for all of it
    assert before - used.total_tokens - 4 <= left() <= 100_000
    set_quota(server, user.owner, tokens_per_minute=100)
    answer = user.http.post("/v1/chat/completions", json={"model": BASE, "messages": HELLO, "max_tokens": 200})
    prompt = used.prompt_tokens
    assert USUAL_ANSWER > 200, "all of the answer is set aside"
    assert f"for {prompt + 200} tokens" in limited(answer, "rate_limit_exceeded")
    assert answer.headers["x-should-retry"] == "false"


def test_who_does_not_wait_for_the_first_token_has_used_the_prompt(
    server: Server, user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_quota(server, user.owner, tokens_per_minute=600)
    submitted = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(server.hub.engine, "submit", lambda request: submitted.set())  # and no token comes of it
        body = json.dumps({"model": BASE, "prompt": [5] * 400, "max_tokens": 100})
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {user.key}\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        where = urlsplit(server.url)
        with socket.create_connection((where.hostname, where.port), timeout=SECONDS) as connection:
            connection.sendall((head + body).encode())
            assert submitted.wait(SECONDS)
        eventually(lambda: not server.gate.inside)
    assert int(server.hub.rates.headers(user.owner)["x-ratelimit-remaining-tokens"]) < 600


def left(answer: httpx.Response, what: str) -> tuple[int, int]:
    """The limit, and what there is of it."""
    limit, remaining = (int(answer.headers[f"x-ratelimit-{which}-{what}"]) for which in ("limit", "remaining"))
    return limit, remaining


def test_adapters_are_limited_and_new_versions_of_one_are_not(server: Server, user: User, adapter: PeftFiles) -> None:
    set_quota(server, user.owner, adapters=2)
    for name in ("a", "b", "a"):
        user.import_adapter(adapter, name)
    answer = user.http.post("/v1/adapters", data={"name": "c"}, files=adapter.upload)
    assert "You have 2 of at most 2 adapters" in limited(answer, "exceeded_quota")
    assert left(answer, "adapters") == (2, 0)
    assert answer.headers["x-should-retry"] == "false"
    [first, _] = user.http.get("/v1/adapters").json()["data"]
    user.http.delete(f"/v1/adapters/{first['id']}").raise_for_status()
    user.import_adapter(adapter, "c")


def test_many_imports_at_once_do_not_get_past_the_quota_together(
    server: Server, user: User, adapter: PeftFiles
) -> None:
    set_quota(server, user.owner, adapters=3)

    def attempt(at: int) -> int:
        return user.http.post("/v1/adapters", data={"name": f"a{at}"}, files=adapter.upload).status_code

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(attempt, range(12)))
    assert set(statuses) <= {200, 429}
    assert statuses.count(200) == len(user.http.get("/v1/adapters").json()["data"]) <= 3


def test_bytes_of_files_and_adapters_are_limited_together(server: Server, user: User, adapter: PeftFiles) -> None:
    imported = user.import_adapter(adapter, "mine")
    set_quota(server, user.owner, bytes=imported["bytes"] + 1000)
    kept = user.upload(b"x" * 600, purpose="user_data")
    answer = user.http.post("/v1/files", data={"purpose": "user_data"}, files={"file": ("a", b"x" * 401)})
    assert "Delete something first" in limited(answer, "exceeded_quota")
    assert left(answer, "bytes") == (imported["bytes"] + 1000, 400)
    user.upload(b"x" * 400, purpose="user_data")
    answer = user.http.post("/v1/adapters", data={"name": "more"}, files=adapter.upload)
    limited(answer, "exceeded_quota")
    used = user.http.get("/v1/quotas").raise_for_status().json()
    assert used["used"] == {"adapters": 1, "bytes": imported["bytes"] + 1000, "jobs": 0}
    assert used["limits"]["bytes"] == imported["bytes"] + 1000
    user.openai.files.delete(kept)
    user.upload(b"x" * 600, purpose="user_data")


@pytest.mark.parametrize("how", ["announced", "in chunks"])
def test_what_is_sent_at_once_is_no_more_than_may_be_kept(server: Server, user: User, how: str) -> None:
    set_quota(server, user.owner, bytes=1000)

    def body() -> Iterator[bytes]:
        yield b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
        yield from (b"x" * MIB for _ in range(5))
        yield b'\r\n--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nuser_data\r\n--b--\r\n'

    headers = {"content-type": "multipart/form-data; boundary=b"}
    content = body() if how == "in chunks" else b"".join(body())
    answer = user.http.post("/v1/files", content=content, headers=headers)
    assert "may keep" in limited(answer, "exceeded_quota")
    assert left(answer, "bytes")[0] == 1000
    user.upload(b"x" * 1000, purpose="user_data")


def test_an_owner_has_only_so_many_uploads_under_way(database: Database) -> None:
    room = Room(database, Quotas(database, Limits()))
    with ExitStack() as many:
        for _ in range(MAX_BODIES):
            many.enter_context(room.arriving("mira"))
        with pytest.raises(TooManyRequests), room.arriving("mira"):
            pass
        with room.arriving("teo") as more:
            more(10**12)
    with room.arriving("mira"):
        pass


def test_jobs_at_once_are_limited_and_a_retry_of_one_is_no_other(server: Server, user: User) -> None:
    set_quota(server, user.owner, jobs=1)
    long = {"n_epochs": 50, "max_steps": 100_000, "batch_size": 1}
    file = user.upload(chat_lines(200))
    body = {"model": BASE, "training_file": file, "suffix": "a", "hyperparameters": long}

    def create(**headers: str) -> httpx.Response:
        return user.http.post("/v1/fine_tuning/jobs", json=body, headers=headers)

    job = create().raise_for_status().json()["id"]
    refused = create()
    assert "You have 1 of at most 1 fine-tuning jobs under way" in limited(refused, "exceeded_quota")
    assert left(refused, "jobs") == (1, 0)
    assert create(**{"x-stainless-retry-count": "1"}).raise_for_status().json()["id"] == job
    assert user.http.get("/v1/quotas").json()["used"]["jobs"] == 1
    user.openai.fine_tuning.jobs.cancel(job)
    other = create().raise_for_status().json()["id"]
    user.openai.fine_tuning.jobs.cancel(other)


def test_an_adapter_that_a_job_will_make_counts(server: Server, user: User, adapter: PeftFiles) -> None:
    set_quota(server, user.owner, adapters=1)
    file = user.upload(chat_lines(200))
    long = {"n_epochs": 50, "batch_size": 1}

    def create(suffix: str | None) -> httpx.Response:
        body = {"model": BASE, "training_file": file, "suffix": suffix, "hyperparameters": long}
        return user.http.post("/v1/fine_tuning/jobs", json=body)

    jobs = [create("a").raise_for_status().json()["id"], create("a").raise_for_status().json()["id"]]
    for suffix in ("b", None):
        assert "You have 1 of at most 1 adapters" in limited(create(suffix), "exceeded_quota")
    limited(user.http.post("/v1/adapters", data={"name": "b"}, files=adapter.upload), "exceeded_quota")
    for job in jobs:
        user.openai.fine_tuning.jobs.cancel(job)
    create("b").raise_for_status()
    for job in user.openai.fine_tuning.jobs.list():
        if job.status not in ("cancelled", "failed", "succeeded"):
            user.openai.fine_tuning.jobs.cancel(job.id)


# -- bytes that jobs make


def model_bytes(server: Server, rank: int = 4) -> int:
    return server.hub.base.layout.numel(rank) * server.hub.base.dtype.itemsize


def used_bytes(user: User) -> int:
    return int(user.http.get("/v1/quotas").raise_for_status().json()["used"]["bytes"])


def said(user: User, job: str, level: str) -> list[str]:
    """What events of that level say, the oldest first."""
    events = user.openai.fine_tuning.jobs.list_events(job, limit=1000)
    return [event.message for event in events if event.level == level][::-1]


def test_a_job_whose_model_would_not_fit_fails_before_it_trains(server: Server, user: User) -> None:
    file = user.upload(chat_lines())
    set_quota(server, user.owner, bytes=used_bytes(user) + model_bytes(server) - 1)
    job = user.openai.fine_tuning.jobs.create(model=BASE, training_file=file, hyperparameters=RANK_4)
    failed = user.job(job.id, "failed")
    assert (failed.error.code, failed.error.param) == ("exceeded_quota", None)
    assert "with what your jobs will make" in failed.error.message
    assert said(user, job.id, "error") == [failed.error.message]
    assert failed.trained_tokens is None
    assert user.http.get("/v1/adapters").json()["data"] == []
    set_quota(server, user.owner, bytes=used_bytes(user) + model_bytes(server))
    again = user.openai.fine_tuning.jobs.create(model=BASE, training_file=file, hyperparameters=RANK_4 | NO_CHECKPOINTS)
    assert user.job(again.id, "succeeded").estimate["bytes"] == model_bytes(server)


def test_what_a_job_will_make_counts_until_it_has_ended(server: Server, user: User) -> None:
    file, other = user.upload(chat_lines(200)), user.upload(chat_lines())
    set_quota(server, user.owner, bytes=used_bytes(user) + model_bytes(server) + 100)
    long = {"n_epochs": 50, "batch_size": 1}
    first = user.openai.fine_tuning.jobs.create(model=BASE, training_file=file, hyperparameters=RANK_4 | long)
    user.job(first.id, "queued", "running")
    before = used_bytes(user)
    second = user.openai.fine_tuning.jobs.create(model=BASE, training_file=other, hyperparameters=RANK_4)
    assert user.job(second.id, "failed").error.code == "exceeded_quota"
    limited(
        user.http.post("/v1/files", data={"purpose": "user_data"}, files={"file": ("a", b"x" * 101)}), "exceeded_quota"
    )
    assert user.upload(b"x" * 100, purpose="user_data")
    user.openai.fine_tuning.jobs.cancel(first.id)
    assert used_bytes(user) == before + 100 - model_bytes(server)


def test_checkpoints_without_room_are_left_out_and_the_job_goes_on(server: Server, user: User) -> None:
    file = user.upload(chat_lines())
    set_quota(server, user.owner, bytes=used_bytes(user) + 2 * model_bytes(server))
    hyperparameters: Any = RANK_4 | {"n_epochs": 4, "early_stopping": 0}
    job = user.openai.fine_tuning.jobs.create(model=BASE, training_file=file, hyperparameters=hyperparameters)
    assert user.job(job.id, "succeeded").fine_tuned_model
    [kept] = user.openai.fine_tuning.jobs.checkpoints.list(job.id)
    left_out = [m for m in said(user, job.id, "warn") if "could not be kept" in m]
    assert len(left_out) == 2
    assert all("You keep" in message for message in left_out)
    assert kept.step_number < min(int(message.split()[4]) for message in left_out)


def test_a_quota_that_became_too_small_while_a_job_trained_fails_it_and_its_last_checkpoint_stays(
    server: Server, user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = Publisher.finish

    def lowered(publisher: Publisher, job: Job, trained: Trained) -> None:
        set_quota(server, user.owner, bytes=1)
        finish(publisher, job, trained)

    monkeypatch.setattr(Publisher, "finish", lowered)
    file = user.upload(chat_lines())
    hyperparameters: Any = RANK_4 | {"n_epochs": 2}
    job = user.openai.fine_tuning.jobs.create(model=BASE, training_file=file, hyperparameters=hyperparameters)
    failed = user.job(job.id, "failed")
    assert failed.error.code == "exceeded_quota"
    [kept] = user.openai.fine_tuning.jobs.checkpoints.list(job.id)
    assert kept.fine_tuned_model_checkpoint in failed.error.message
    assert [m.id for m in user.openai.models.list()][1:] == [kept.fine_tuned_model_checkpoint]
    assert user.ask(kept.fine_tuned_model_checkpoint) is not None
    monkeypatch.undo()
    set_quota(server, user.owner, bytes=None)
    more = user.openai.fine_tuning.jobs.create(model=kept.fine_tuned_model_checkpoint, training_file=file)
    user.job(more.id, "succeeded")


def test_the_command_line_shows_and_sets_quotas(server: Server, user: User) -> None:
    def ran(*arguments: str) -> str:
        done = run_cli("quotas", *arguments, user=server.admin)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = ran("set", user.owner, "--requests", "5", "--bytes", "1MiB", "--jobs", "none")
    assert "1.0 MiB" in said
    found = json.loads(ran("show", user.owner, "--json"))
    assert found["set"] == {"requests_per_minute": 5, "bytes": 2**20, "jobs": None}
    assert found["limits"] == {**found["limits"], **found["set"]}
    assert user.owner in ran("show")
    assert json.loads(ran("set", user.owner, "--reset", "--json"))["set"] == {}
    for wrong in (["--requests", "-1"], ["--requests", "0"], ["--tokens", "1.5"], [], ["--reset", "--jobs", "1"]):
        failed = run_cli("quotas", "set", user.owner, *wrong, user=server.admin)
        assert failed.returncode != 0, wrong
        assert failed.stderr


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"jobs": -1},
        {"requests_per_minute": 0},
        {"tokens_per_minute": "5"},
        {"cats": 1},
        {"bytes": 1.5},
        {"jobs": 2**60},
    ],
    ids=str,
)
def test_a_quota_that_cannot_be_is_refused(server: Server, user: User, body: Any) -> None:
    answer = server.admin.http.patch(f"/admin/quotas/{user.owner}", json=body)
    assert answer.status_code == 400
    assert server.admin.http.get(f"/admin/quotas/{user.owner}").json()["set"] == {}
