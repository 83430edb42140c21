"""Short runs of `scripts/soak`, which people run for longer."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from adapterhub.base.native import library

ROOT = Path(__file__).resolve().parents[1]
needs_compiler = pytest.mark.skipif(library() is None, reason="no C++ compiler")


def soak(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/soak.py", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)


@needs_compiler
def test_the_engine_answers_right_and_leaks_nothing_under_churn() -> None:
    run = soak("engine", "--requests", "400", "--adapters", "40")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "No fault was found" in run.stdout
    for what in ("answered", "cancelled", "evictions", "adapters trained", "tokens shared"):
        found = re.search(rf"(\d+) {what}", run.stdout)
        assert found, what
        assert int(found[1]) > 0, what


@needs_compiler
def test_a_wrong_answer_does_not_go_unnoticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import soak

    alone = soak.Town.answers_alone

    def one_wrong(town: soak.Town) -> list[list[int]]:
        first, *others = alone(town)
        return [[-1, *first[1:]], *others]

    monkeypatch.setattr(soak.Town, "answers_alone", one_wrong)
    with pytest.raises(SystemExit) as ended:
        soak.main(["engine", "--requests", "80", "--adapters", "2"])
    assert ended.value.code
    assert "is not [-1]" in capsys.readouterr().out


def test_servers_that_are_killed_lose_nothing_and_keep_nothing() -> None:
    run = soak("store", "--kills", "4")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "No fault was found" in run.stdout
    for home in ("with a store", "without one"):
        assert re.search(rf"{home}: .*\d+ answers checked.* 1 doctors.* 4 kills", run.stdout), run.stdout


MEDDLING: dict[str, Callable[[Path], object]] = {
    "cannot be read: No such file": lambda blobs: [path.unlink() for path in blobs.iterdir()],
    "cannot be read: its digest": lambda blobs: [flip_last(path) for path in blobs.iterdir()],
    "no row names": lambda blobs: (blobs / "unnamed.block").mkdir(),
    "went": lambda blobs: forget_adapters(blobs.with_name("hub.db")),
}


@pytest.mark.parametrize("said", MEDDLING)
def test_what_is_lost_or_changed_between_two_lives_does_not_go_unnoticed(
    base_directory: Path, tmp_path: Path, said: str
) -> None:
    import soak_store

    class Meddled(soak_store.Home):
        def after_kill(self) -> None:
            MEDDLING[said](self.server.data_dir / "blobs")

    home = Meddled(base_directory, tmp_path, soak_store.make_variants(base_directory, tmp_path), 0, store=False)
    home.run(5)
    assert any(said in fault for fault in home.faults), home.faults


def flip_last(path: Path) -> None:
    *kept, last = path.read_bytes()
    path.write_bytes(bytes([*kept, last ^ 1]))


def forget_adapters(database: Path) -> None:
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("pragma foreign_keys = on")
        connection.execute("delete from adapters")
