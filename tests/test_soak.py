"""A short run of `scripts/soak`, which people run for longer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from adapterhub.base.native import library

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler")


def test_the_engine_answers_right_and_leaks_nothing_under_churn() -> None:
    command = [sys.executable, "scripts/soak.py", "engine", "--requests", "400", "--adapters", "40"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "No fault was found" in run.stdout
    for what in ("answered", "cancelled", "evictions", "adapters trained", "tokens shared"):
        found = re.search(rf"(\d+) {what}", run.stdout)
        assert found, what
        assert int(found[1]) > 0, what


def test_a_wrong_answer_does_not_go_unnoticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
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
