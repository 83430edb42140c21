"""The server's database: who waits for whom."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from adapterhub.swap.database import Database
from tests.serving import SECONDS


class Slow(Sequence[int]):
    """Arguments of a query that begins, and does not end before it is told to."""

    def __init__(self) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()

    def __len__(self) -> int:
        return 1

    def __getitem__(self, at: Any) -> Any:
        self.begun.set()
        assert self.may_end.wait(SECONDS)
        return 7


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = Database(tmp_path / "hub.db")
    with made.transaction() as db:
        db.execute("create table things (n integer)")
    yield made
    made.close()


def test_a_reader_waits_for_no_other_and_for_no_writer(database: Database) -> None:
    slow, found = Slow(), list[Any]()
    reading = threading.Thread(target=lambda: found.append(database.rows("select ? as n", slow)))
    reading.start()
    assert slow.begun.wait(SECONDS)
    writing, may_commit = threading.Event(), threading.Event()

    def write() -> None:
        with database.transaction() as db:
            db.execute("insert into things values (1)")
            writing.set()
            assert may_commit.wait(SECONDS)

    writer = threading.Thread(target=write)
    writer.start()
    assert writing.wait(SECONDS)
    quick = list[Any]()
    other = threading.Thread(target=lambda: quick.append(database.rows("select count(*) as n from things")))
    other.start()
    other.join(20)
    alone = list(quick)
    slow.may_end.set(), may_commit.set()
    for thread in (reading, writer, other):
        thread.join(SECONDS)
    assert (alone, found) == ([[{"n": 0}]], [[{"n": 7}]])
    assert database.row("select n from things") == {"n": 1}


def test_who_reads_while_it_is_closed_reads_to_the_end(database: Database) -> None:
    slow, found = Slow(), list[Any]()
    reading = threading.Thread(target=lambda: found.append(database.rows("select ? as n", slow)))
    reading.start()
    assert slow.begun.wait(SECONDS)
    database.close()
    slow.may_end.set()
    reading.join(SECONDS)
    assert found == [[{"n": 7}]]
    with pytest.raises(sqlite3.ProgrammingError):
        database.rows("select 1")
