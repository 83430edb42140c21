"""Jobs in the database: which comes next, who may have how many, and changes that come twice or too late."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from adapterhub.errors import BadRequest, NotFound, QuotaExceeded
from adapterhub.swap.database import Database
from adapterhub.train.dataset import Kind
from adapterhub.train.files import FileStore
from adapterhub.train.job import Job, Note, Order, Priority, Status
from adapterhub.train.jobs import JobStore


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = Database(tmp_path / "hub.db")
    yield made
    made.close()


@pytest.fixture
def jobs(database: Database) -> JobStore:
    return JobStore(database)


def order(owner: str, **changes: Any) -> Order:
    fields: dict[str, Any] = {
        "owner": owner,
        "model": "tiny",
        "training_file": "file-1",
        "validation_file": None,
        "input_bytes": 100,
        "suffix": None,
        "seed": 1,
        "method": Kind.SUPERVISED,
        "hyperparameters": {},
        "priority": Priority.NORMAL,
        "initial": None,
        "metadata": None,
        "fingerprint": "f",
        "digest": "d",
        "key": None,
    }
    return Order(**{**fields, **changes})


def made(jobs: JobStore, owner: str, status: Status = Status.QUEUED, **changes: Any) -> str:
    """A job in that state; returns its id."""
    job, _ = jobs.create(order(owner, **changes), retry=False)
    if status is not Status.VALIDATING:
        jobs.move(job, Status.QUEUED, "validated", report="{}")
    if status not in (Status.VALIDATING, Status.QUEUED):
        jobs.move(jobs.get(None, job.id), status, "moved")
    return job.id


def run_order(jobs: JobStore, most: int = 100) -> list[str]:
    """The ids of the queued jobs as they would be started, were there a place for each."""
    started: list[str] = []
    while (job := jobs.next_to_run(most, ())) is not None:
        assert jobs.move(job, Status.RUNNING, "started")
        started.append(job.id)
    return started


# -- what comes next


def test_an_owner_with_many_jobs_waits_for_those_of_others(jobs: JobStore) -> None:
    many = [made(jobs, "many") for _ in range(4)]
    few = made(jobs, "few")
    assert run_order(jobs) == [many[0], few, *many[1:]]


def test_of_one_owners_jobs_priority_comes_before_age(jobs: JobStore) -> None:
    low, normal, high, older = (
        made(jobs, "one", priority=p) for p in (Priority.LOW, Priority.NORMAL, Priority.HIGH, Priority.NORMAL)
    )
    assert run_order(jobs) == [high, normal, older, low]


def test_no_priority_gets_an_owner_past_one_who_has_less(jobs: JobStore) -> None:
    urgent = [made(jobs, "urgent", priority=Priority.HIGH) for _ in range(3)]
    modest = made(jobs, "modest", priority=Priority.LOW)
    assert run_order(jobs) == [urgent[0], modest, *urgent[1:]]


def test_an_owner_has_no_more_places_than_the_limit_however_many_are_free(jobs: JobStore) -> None:
    many = [made(jobs, "many") for _ in range(5)]
    assert run_order(jobs, most=2) == many[:2]
    jobs.cancel("many", many[0])
    assert run_order(jobs, most=2) == [many[2]]


def test_a_job_that_is_still_being_taken_out_is_passed_over(jobs: JobStore) -> None:
    first, second = made(jobs, "one"), made(jobs, "one")
    found = jobs.next_to_run(9, [first])
    assert found is not None
    assert found.id == second
    assert jobs.next_to_run(9, [first, second]) is None


def test_a_paused_job_that_is_resumed_has_its_old_place(jobs: JobStore) -> None:
    first, second = made(jobs, "one"), made(jobs, "one")
    jobs.pause("one", first)
    assert [job.id for job in jobs.in_status(Status.QUEUED)] == [second]
    assert jobs.resume("one", first).status is Status.QUEUED
    assert run_order(jobs) == [first, second]


def test_validation_is_fair_between_owners_and_small_files_pass_large_ones(jobs: JobStore) -> None:
    made(jobs, "many")
    large = made(jobs, "many", Status.VALIDATING, input_bytes=10**9)
    small = made(jobs, "many", Status.VALIDATING)
    other = made(jobs, "new", Status.VALIDATING, input_bytes=10**8)

    def validated(most_bytes: int | None, *but: str) -> str | None:
        job = jobs.next_to_validate(most_bytes, but)
        return job.id if job else None

    assert validated(None) == other
    assert validated(None, other) == large
    assert validated(10**6) == small
    assert validated(10**6, small) is None


def test_a_job_that_goes_on_from_a_name_waits_until_those_before_it_have_added_their_versions(jobs: JobStore) -> None:
    mine = {"suffix": "mine", "model": "one/mine", "initial": "ft:tiny:one:mine:1"}
    base = made(jobs, "one", Status.PAUSED, suffix="mine")
    first = made(jobs, "one", **mine)
    second = made(jobs, "one", priority=Priority.HIGH, **mine)
    others = [made(jobs, "one", suffix="other"), made(jobs, "one", **{**mine, "model": "one/mine@1"})]
    others += [made(jobs, "one", **{**mine, "model": mine["initial"]}), made(jobs, "two", suffix="mine")]
    assert jobs.awaited(jobs.get(None, second)) == [base, first]
    assert [jobs.awaited(jobs.get(None, job)) for job in others] == [[]] * 4
    assert set(run_order(jobs)) == set(others)
    jobs.cancel("one", base)
    assert run_order(jobs) == [first]
    jobs.fail(jobs.get(None, first), BadRequest("no"))
    assert run_order(jobs) == [second]


# -- who is let in


def test_a_job_that_is_not_admitted_is_not_made(jobs: JobStore) -> None:
    made(jobs, "one")

    def full(*_: Any) -> None:
        raise QuotaExceeded("You have 1 fine-tuning job under way, of at most 1.")

    with pytest.raises(QuotaExceeded):
        jobs.create(order("one"), retry=False, check=full)
    assert len(jobs.under_way()) == 1


def test_a_retried_creation_gets_its_job_even_when_nobody_is_admitted(jobs: JobStore) -> None:
    ids = [made(jobs, "one", key=f"k{i}", digest=f"d{i}") for i in range(2)]

    def full(*_: Any) -> None:
        raise QuotaExceeded("You have 2 fine-tuning jobs under way, of at most 2.")

    again, new = jobs.create(order("one", key="k0", digest="d0"), retry=False, check=full)
    assert (again.id, new) == (ids[0], False)
    again, new = jobs.create(order("one", digest="d1"), retry=True, check=full)
    assert (again.id, new) == (ids[1], False)


# -- changes of state


@pytest.mark.parametrize("status", list(Status))
def test_each_state_can_be_cancelled_paused_and_resumed_or_says_why_not(jobs: JobStore, status: Status) -> None:
    ended = status in (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED)
    cases: list[tuple[Callable[[str, str], Job], bool]] = [
        (jobs.pause, not ended and status is not Status.PAUSED),
        (jobs.resume, status is Status.PAUSED),
        (jobs.cancel, not ended),
    ]
    for change, allowed in cases:
        job = made(jobs, f"by-{change.__name__}", status)
        if allowed:
            assert change(f"by-{change.__name__}", job).status is not status
            continue
        before = jobs.get(None, job)
        with pytest.raises(BadRequest, match=str(status)) as refused:
            change(f"by-{change.__name__}", job)
        assert refused.value.code == "invalid_status"
        assert jobs.get(None, job) == before


def test_a_job_goes_back_to_where_it_was_paused(jobs: JobStore) -> None:
    for status, after in (
        (Status.VALIDATING, Status.VALIDATING),
        (Status.QUEUED, Status.QUEUED),
        (Status.RUNNING, Status.QUEUED),
    ):
        job = made(jobs, "one", status)
        jobs.pause("one", job)
        assert jobs.resume("one", job).status is after


def test_what_comes_too_late_changes_nothing(jobs: JobStore) -> None:
    running = jobs.get(None, made(jobs, "one", Status.RUNNING))
    jobs.pause("one", running.id)
    jobs.resume("one", running.id)
    events = jobs.events.page(running.id, None, 100)
    assert not jobs.move(running, Status.SUCCEEDED, "too late")
    assert not jobs.fail(running, BadRequest("too late"))
    assert jobs.get(None, running.id).status is Status.QUEUED
    assert jobs.events.page(running.id, None, 100) == events


def test_nothing_is_noted_of_a_job_that_has_ended_and_of_a_paused_one_what_it_still_did(jobs: JobStore) -> None:
    ids = [made(jobs, "one", status) for status in (Status.RUNNING, Status.PAUSED, Status.CANCELLED)]
    jobs.note([Note(job, f"step {step}", {"step": step}, 10 * step, 99) for step in (1, 2) for job in ids])
    running, paused, cancelled = (jobs.get(None, job) for job in ids)
    assert [(j.trained_tokens, j.estimated_finish) for j in (running, paused, cancelled)] == [
        (20, 99),
        (20, None),
        (None, None),
    ]
    assert [jobs.events.metrics(job) for job in ids] == [[{"step": 1}, {"step": 2}]] * 2 + [[]]


def test_what_belongs_to_another_is_as_unknown_as_what_is_not_there(jobs: JobStore) -> None:
    job = made(jobs, "one")
    for act in (jobs.get, jobs.cancel, jobs.pause, jobs.resume):
        messages = set()
        for identity in (job, "ftjob-none"):
            with pytest.raises(NotFound) as refused:
                act("two", identity)
            messages.add(refused.value.message.replace(identity, "X"))
        assert len(messages) == 1
    assert jobs.get("one", job).status is Status.QUEUED


# -- lists


def test_lists_are_paged_whatever_is_added_meanwhile(jobs: JobStore) -> None:
    ids = [made(jobs, "one", metadata={"n": str(i % 2)} if i else None) for i in range(6)]
    seen: list[str] = []
    after = None
    while True:
        page, more = jobs.page("one", after, 2, metadata={})
        seen += [job.id for job in page]
        if not more:
            break
        after = seen[-1]
        jobs.cancel("one", ids[len(seen)])
        made(jobs, "one", metadata={"n": "later"})
    assert seen == ids[::-1]
    assert [j.id for j in jobs.page("one", None, 9, metadata={"n": "1"})[0]] == [ids[5], ids[3], ids[1]]
    assert [j.id for j in jobs.page("one", None, 9, metadata=None)[0]] == [ids[0]]
    assert jobs.page("one", None, 9, metadata={"n": "1", "m": "1"}) == ([], False)
    with pytest.raises(BadRequest, match="no item 'ftjob-none'"):
        jobs.page("one", "ftjob-none", 2, metadata={})
    with pytest.raises(BadRequest, match="no item"):
        jobs.page("two", ids[0], 2, metadata={})


def test_thousands_of_events_are_paged_without_reading_them_all(jobs: JobStore, database: Database) -> None:
    job = made(jobs, "one", Status.RUNNING)
    jobs.note([Note(job, f"Step {i}", {"step": i}, i, 0) for i in range(1, 5001)])
    first, more = jobs.events.page(job, None, 2)
    assert ([e.message for e in first], more) == (["Step 5000", "Step 4999"], True)
    last, more = jobs.events.page(job, jobs.events.page(job, None, 4990)[0][-1].id, 1000)
    assert ([e.message for e in last][:2], len(last), more) == (["Step 10", "Step 9"], 10 + 4, False)
    [plan] = database.rows(
        "explain query plan select * from events where job = ? and rowid < ? order by rowid desc limit 2", (job, 9)
    )
    assert "events_by_job" in plan["detail"]


def test_the_curve_has_each_step_once_as_it_was_made_last(jobs: JobStore) -> None:
    job = made(jobs, "one", Status.RUNNING)
    for loss, steps in ((1.0, range(1, 12)), (2.0, range(9, 14))):
        jobs.note([Note(job, "step", {"step": step, "train_loss": loss}, 0, 0) for step in steps])
    assert jobs.events.metrics(job) == [{"step": s, "train_loss": 1.0 if s < 9 else 2.0} for s in range(1, 14)]


def test_files_are_paged_from_both_ends(database: Database, tmp_path: Path) -> None:
    files = FileStore(database, tmp_path / "uploads")
    ids = [files.upload("one", f"{i}.txt", ("vision", "evals")[i % 2], [b"x"]).id for i in range(5)]
    for ascending, expected in ((False, ids[::-1]), (True, ids)):
        seen: list[str] = []
        more = True
        while more:
            page, more = files.page("one", seen[-1] if seen else None, 2, ascending=ascending)
            seen += [file.id for file in page]
        assert seen == expected
    assert [f.id for f in files.page("one", None, 9, purpose="evals")[0]] == [ids[3], ids[1]]
    with pytest.raises(BadRequest, match="no item"):
        files.page("two", ids[0], 9)


# -- what there was before


def test_jobs_of_an_earlier_server_are_validated_again_if_they_were_under_way(tmp_path: Path) -> None:
    database = Database(tmp_path / "hub.db")
    store = JobStore(database)
    ids = [made(store, "one", s) for s in (Status.QUEUED, Status.RUNNING, Status.SUCCEEDED, Status.CANCELLED)]
    database.close()
    with sqlite3.connect(tmp_path / "hub.db") as old:  # as it was before jobs had more to say
        for column in ("validation_file", "input_bytes", "method", "priority", "initial", "report", "estimate"):
            old.execute(f"alter table jobs drop column {column}")
        for column in ("proof", "result_file"):
            old.execute(f"alter table jobs drop column {column}")
        old.execute("delete from _sqlite_migrations where name in ('add_methods_and_states', 'drop_saved_step')")
    old.close()
    database = Database(tmp_path / "hub.db")
    jobs = [JobStore(database).get("one", identity) for identity in ids]
    assert [job.status for job in jobs] == ["validating_files", "validating_files", "succeeded", "cancelled"]
    assert {(job.method, job.priority, job.report) for job in jobs} == {(Kind.SUPERVISED, Priority.NORMAL, None)}
    database.close()
