"""Usage: what answers, jobs and storage are counted as, by day, owner, key and adapter, and how it is asked for."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import openai
import pytest

from adapterhub.api.tenancy.keys import KeyStore
from adapterhub.api.tenancy.meter import Meter
from adapterhub.api.tenancy.terms import EVERYDAY, Group
from adapterhub.api.tenancy.usage import NONE, Asked, Counts, Line, Usage, day_of
from adapterhub.swap.database import Database
from adapterhub.swap.tables import migrations as swap_tables
from adapterhub.train.files import migrations as file_tables
from adapterhub.train.jobs import migrations as job_tables
from tests.serving import BASE, PeftFiles, Server, User, chat_lines, eventually, process, run_cli

HELLO: list[Any] = [{"role": "user", "content": "Hello there"}]
DAY = 86400
NOON = int(datetime(2026, 3, 1, 12, tzinfo=UTC).timestamp())


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(tmp_path / "hub.db")
    for tables in (swap_tables, file_tables, job_tables):
        opened.migrate(tables)
    yield opened
    opened.close()


@pytest.fixture
def usage(database: Database) -> Usage:
    KeyStore(database)
    return Usage(database)


def asked(*by: Group, owner: str | None = None, first: str = "2026-01-01", last: str = "2026-12-31") -> Asked:
    return Asked(date.fromisoformat(first), date.fromisoformat(last), owner, by)


# -- counting


def test_counts_are_summed_up_in_whatever_groups_are_asked_for(usage: Usage, database: Database) -> None:
    keys = KeyStore(database)
    app, site = (keys.make("mira", EVERYDAY, project=project).key.id for project in ("app", "site"))
    lines = {
        Line("mira", "2026-03-01", app, "me"): Counts(1, 10, 100),
        Line("mira", "2026-03-01", site, "me"): Counts(2, 20, 200, cold_boots=1),
        Line("mira", "2026-03-02", app, NONE): Counts(4, 40, 400),
        Line("teo", "2026-03-02", "key-gone", "it"): Counts(8, 80, 800),
    }
    usage.add(lines)
    usage.add(lines)

    def report(*by: Group, **more: Any) -> list[tuple[Any, ...]]:
        return [(*(row[group] for group in by), row["requests"]) for row in usage.report(asked(*by, **more))]

    assert report() == [(30,)]
    assert report(owner="mira") == [(14,)]
    assert report(Group.DAY, owner="mira") == [("2026-03-01", 6), ("2026-03-02", 8)]
    assert report(Group.PROJECT) == [("", 16), ("app", 10), ("site", 4)]
    assert report(Group.KEY, owner="mira") == sorted([(app, 10), (site, 4)])
    assert report(Group.OWNER, Group.ADAPTER) == [("mira", "", 8), ("mira", "me", 6), ("teo", "it", 16)]
    assert report(Group.ADAPTER, first="2026-03-02") == [("", 8), ("it", 16)]
    assert report(owner="nobody") == [(0,)]
    [row] = usage.report(asked(owner="mira", last="2026-03-01"))
    assert row == Counts(6, 60, 600, 0, 2, 0.0)._asdict()


def test_erasing_removes_an_owners_usage_and_no_others(usage: Usage) -> None:
    usage.add({Line(owner, "2026-03-01", "key", "a"): Counts(1) for owner in ("mira", "teo")})
    assert usage.erase("mira") == 1
    assert [row["owner"] for row in usage.report(asked(Group.OWNER))] == ["teo"]


def test_what_is_noted_is_kept_when_it_cannot_be_written_down(usage: Usage, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter(usage)
    meter.note("mira", "key", None, Counts(1, 2, 3))
    with monkeypatch.context() as patched:
        patched.setattr(usage, "add", failing)
        with pytest.raises(sqlite3.OperationalError):
            meter.save()
    meter.note("mira", "key", None, Counts(1, 2, 3))
    meter.save()
    [row] = usage.report(Asked(date(2026, 1, 1), date(9999, 1, 1)))
    assert (row["requests"], row["input_tokens"], row["output_tokens"]) == (2, 4, 6)


def failing(*_: Any) -> None:
    raise sqlite3.OperationalError("no")


# -- storage


def keep(database: Database, owner: str, name: str, nbytes: int, created_at: int) -> None:
    with database.transaction() as db:
        db.table("adapters").insert({"id": f"{owner}-{name}", "owner": owner, "name": name, "created_at": created_at})
        version = {"number": 1, "digest": name, "nbytes": nbytes, "rank": 1, "fingerprint": "f", "base": "b"}
        more = {"id": f"v-{name}", "adapter": f"{owner}-{name}", "origin": "import", "created_at": created_at}
        db.table("versions").insert({**version, **more})


def test_storage_is_counted_by_the_hour_and_split_at_midnight(usage: Usage, database: Database) -> None:
    keep(database, "mira", "old", 1000, NOON - 10 * DAY)
    usage.count_storage(NOON)
    assert usage.report(asked(Group.DAY)) == [], "what was before it was counted is nobody's"
    keep(database, "mira", "new", 100, NOON + 6 * 3600)
    file = {"id": "file-1", "owner": "teo", "filename": "f", "purpose": "p", "bytes": 10, "created_at": NOON}
    database.insert("files", file)
    for hours in (3, 7, 40):  # the last time after a day without a server
        usage.count_storage(NOON + hours * 3600)
    found = {
        (row["owner"], row["adapter"], row["day"]): row["byte_hours"]
        for row in usage.report(asked(Group.OWNER, Group.ADAPTER, Group.DAY))
    }
    assert found == {
        ("mira", "old", "2026-03-01"): 1000 * 12,
        ("mira", "old", "2026-03-02"): 1000 * 24,
        ("mira", "old", "2026-03-03"): 1000 * 4,
        ("mira", "new", "2026-03-01"): 100 * 6,
        ("mira", "new", "2026-03-02"): 100 * 24,
        ("mira", "new", "2026-03-03"): 100 * 4,
        ("teo", "", "2026-03-01"): 10 * 12,
        ("teo", "", "2026-03-02"): 10 * 24,
        ("teo", "", "2026-03-03"): 10 * 4,
    }
    usage.count_storage(NOON)  # a clock that went back counts nothing twice
    usage.count_storage(NOON + 40 * 3600)
    assert sum(row["byte_hours"] for row in usage.report(asked())) == sum(found.values())


# -- training


def test_trained_tokens_count_once_and_to_the_key_that_created_the_job(usage: Usage, database: Database) -> None:
    job = {
        "id": "ftjob-1",
        "owner": "mira",
        "status": "running",
        "model": "b",
        "training_file": "f",
        "suffix": "me",
        "seed": 1,
        "hyperparameters": "{}",
        "fingerprint": "f",
        "created_at": 1,
    }
    database.insert("jobs", job)
    usage.follow_job("ftjob-1", "mira", "key-1")
    for day, trained in (("2026-03-01", 100), ("2026-03-01", 250), ("2026-03-02", 40), ("2026-03-02", 300)):
        database.update("jobs", "ftjob-1", trained_tokens=trained)
        usage.count_training(day)
    database.update("jobs", "ftjob-1", trained_tokens=320, finished_at=5)
    usage.count_training("2026-03-03")
    usage.count_training("2026-03-03")
    rows = usage.report(asked(Group.DAY, Group.KEY, Group.ADAPTER))
    assert [(row["day"], row["key"], row["adapter"], row["training_tokens"]) for row in rows] == [
        ("2026-03-01", "key-1", "me", 250),
        ("2026-03-02", "key-1", "me", 50),
        ("2026-03-03", "key-1", "me", 20),
    ]
    assert database.rows("select * from metered_jobs") == [], "the job has ended"


# -- over HTTP


def mine(user: User, *by: str, **params: Any) -> list[dict[str, Any]]:
    answer = user.http.get("/v1/usage", params={"group_by": list(by), **params})
    return answer.raise_for_status().json()["data"]


def test_usage_is_what_the_answers_say_of_whole_and_streamed_and_cut_off_ones(
    server: Server, user: User, adapter: PeftFiles
) -> None:
    alias = user.import_adapter(adapter, "mine")["model"]
    expected: Counter[str] = Counter()

    def count(usage: Any) -> None:
        expected.update(requests=1, input_tokens=usage.prompt_tokens, output_tokens=usage.completion_tokens)

    chat = user.openai.chat.completions
    count(chat.create(model=alias, messages=HELLO, max_tokens=5, n=3).usage)
    options: Any = {"stream_options": {"include_usage": True}, "stream": True}
    count(list(chat.create(model=alias, messages=HELLO, max_tokens=5, **options))[-1].usage)
    count(user.openai.completions.create(model=alias, prompt=["Hello", "you"], max_tokens=4).usage)
    with pytest.raises(openai.BadRequestError):
        chat.create(model=alias, messages=HELLO, max_tokens=10**6)
    with pytest.raises(openai.NotFoundError):
        chat.create(model=f"{user.owner}/none", messages=HELLO)
    [row] = mine(user, "adapter")
    assert {name: row[name] for name in expected} == expected
    assert (row["adapter"], row["cold_boots"], row["training_tokens"]) == ("mine", 1, 0)

    with user.openai.chat.completions.create(
        model=alias, messages=HELLO, stream=True, extra_body={"ignore_eos": True}
    ) as cut:
        next(iter(cut))
    row = eventually(lambda: next((row for row in mine(user, "adapter") if row["requests"] == 4), None))
    assert row["output_tokens"] > expected["output_tokens"], "what was made of it before it was cut off"
    assert row["input_tokens"] > expected["input_tokens"]


def test_usage_is_told_apart_by_key_and_project_and_the_base_is_no_adapter(server: Server, user: User) -> None:
    made = server.hub.keys.make(user.owner, EVERYDAY, project="app")
    other = server.as_user(user.owner, made.secret)
    user.ask(BASE)
    other.ask(BASE), other.ask(BASE)
    assert {row["project"]: row["requests"] for row in mine(user, "project")} == {"default": 1, "app": 2}
    assert {row["key"]: row["requests"] for row in mine(other, "key")}[made.key.id] == 2
    assert [row["adapter"] for row in mine(user, "adapter")] == [None]


def test_a_jobs_tokens_are_counted_as_its_own_number_says(server: Server, user: User) -> None:
    job = user.job(user.train(chat_lines(), suffix="me", n_epochs=2), "succeeded")
    [row] = [row for row in mine(user, "adapter", "key") if row["adapter"] == "me"]
    assert row["training_tokens"] == job.trained_tokens > 0
    [key] = server.hub.keys.list(user.owner)
    assert row["key"] == key.id


def test_what_is_deleted_between_two_counts_of_storage_is_counted_until_then(
    server: Server, user: User, adapter: PeftFiles
) -> None:
    imported = user.import_adapter(adapter, "mine")
    file = user.upload(b"x" * 3_600_000, purpose="user_data")
    until = imported["created_at"] + 3
    eventually(lambda: datetime.now(UTC).timestamp() > until)
    user.http.delete(f"/v1/adapters/{imported['id']}").raise_for_status()
    user.openai.files.delete(file)
    kept = {row["adapter"]: row["byte_hours"] for row in mine(user, "adapter")}
    for name, nbytes in (("mine", imported["bytes"]), (None, 3_600_000)):
        assert nbytes * 2 / 3600 <= kept[name] <= nbytes * 600 / 3600


def test_an_owner_sees_their_own_usage_and_an_admin_everybodys(server: Server, user: User) -> None:
    other = server.user()
    user.ask(BASE), other.ask(BASE)
    for params in ({}, {"owner": other.owner}):
        assert {row["owner"] for row in mine(user, "owner", **params)} == {user.owner}

    def all_of(**params: Any) -> list[dict[str, Any]]:
        return server.admin.http.get("/admin/usage", params=params).raise_for_status().json()["data"]

    assert {user.owner, other.owner} <= {row["owner"] for row in all_of(group_by="owner")}
    [row] = all_of(group_by="owner", owner=other.owner)
    assert (row["owner"], row["requests"]) == (other.owner, 1)
    assert user.http.get("/admin/usage").status_code == 403


def test_usage_is_paged_and_comes_as_csv_with_the_same_numbers(server: Server, user: User) -> None:
    today = datetime.now(UTC).date()
    server.hub.usage.add(
        {
            Line(user.owner, (today - timedelta(days=days)).isoformat(), "key-1", name): Counts(days, 1, 2, 3, 4, 0.5)
            for days in range(1, 40)
            for name in (NONE, "a")
        }
    )
    rows = mine(user, "day", "adapter")
    assert len(rows) == 2 * 29, "the last 30 days by default"
    first = {"group_by": ["day", "adapter"], "from": (today - timedelta(days=35)).isoformat()}
    paged: list[dict[str, Any]] = []
    while True:
        page = user.http.get("/v1/usage", params={**first, "limit": 7, "after": len(paged)}).raise_for_status().json()
        paged += page["data"]
        if not page["has_more"]:
            break
        assert page["last_id"] == str(len(paged))
    assert len(paged) == 2 * 35
    answer = user.http.get("/v1/usage", params={**first, "format": "csv"}).raise_for_status()
    assert answer.headers["content-type"].startswith("text/csv")
    table = list(csv.DictReader(io.StringIO(answer.text)))
    counts = Counts._fields
    assert list(table[0]) == ["day", "adapter", *counts]
    assert [tuple(map(float, (row[name] for name in counts))) for row in table] == [
        tuple(float(row[name]) for name in counts) for row in paged
    ]
    assert [(row["day"], row["adapter"]) for row in table] == [(row["day"], row["adapter"] or "") for row in paged]


@pytest.mark.parametrize(
    "params",
    [
        {"from": "2026-02-30"},
        {"from": "2026-03-02", "to": "2026-03-01"},
        {"group_by": "cat"},
        {"format": "xml"},
        {"after": "-1"},
        {"limit": "0"},
    ],
    ids=str,
)
def test_a_report_that_cannot_be_is_refused(user: User, params: dict[str, str]) -> None:
    answer = user.http.get("/v1/usage", params=params)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize("params", [{"to": "0001-01-01"}, {"from": "9999-12-31"}, {"to": "9999-12-31"}], ids=str)
def test_any_day_there_is_can_be_asked_for(user: User, params: dict[str, str]) -> None:
    assert user.http.get("/v1/usage", params=params).status_code == 200


def test_usage_and_last_uses_outlive_a_kill(base_directory: Path, tmp_path: Path) -> None:
    with process(base_directory, tmp_path / "data") as server:
        user = server.start().user("mira")
        user.ask(BASE)
        database = Database(server.data_dir / "hub.db")
        keys = KeyStore(database)
        eventually(lambda: keys.list("mira")[0].last_used_at and database.rows("select * from usage"))
        database.close()
        server.kill()
        user = server.start().user("mira", user.key)
        user.ask(BASE)
        assert [row["requests"] for row in mine(user)] == [2]
        assert server.stop() == 0
        database = Database(server.data_dir / "hub.db")
        assert database.rows("select requests from usage where owner = 'mira'") == [{"requests": 2}]
        database.close()


def test_the_command_line_shows_usage_as_table_json_and_csv(server: Server, user: User) -> None:
    user.ask(BASE)

    def ran(*arguments: str, who: User = user) -> str:
        done = run_cli("usage", *arguments, user=who)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert day_of(datetime.now(UTC).timestamp()) in ran()
    [row] = json.loads(ran("--by", "owner", "--json"))
    assert (row["owner"], row["requests"]) == (user.owner, 1)
    [row] = csv.DictReader(io.StringIO(ran("--by", "owner", "--by", "adapter", "--csv")))
    assert (row["owner"], row["adapter"], row["requests"]) == (user.owner, "", "1")
    assert user.owner in ran("--all", who=server.admin)
    assert json.loads(ran("--owner", user.owner, "--by", "day", "--json", who=server.admin))[0]["requests"] == 1
    assert "admin key" in run_cli("usage", "--all", user=user).stderr
