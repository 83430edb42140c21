"""`scripts/gpu_check` itself, on a CPU and without the packages that a machine with a GPU need not have."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_check
import pytest
import torch
from figure import Figure
from gpu import run
from gpu.apart import Result, Section, apart
from gpu.clock import Clock
from gpu.limits import Limits
from gpu.report import Check, Report

ROOT = Path(__file__).resolve().parents[1]
LACKING = """
import sys
for name in (
    "fastapi", "starlette", "uvicorn", "uvloop", "httptools", "python_multipart", "sqlite_utils", "gguf", "openai",
    "sortedcontainers", "llguidance", "prometheus_client", "opentelemetry", "hypothesis", "matplotlib", "pynvml",
):
    sys.modules[name] = None  # importing it raises ImportError
"""  # in every process, as it starts


def test_it_checks_and_measures_where_only_torch_transformers_and_peft_are(tmp_path: Path) -> None:
    found, page = tmp_path / "found.json", tmp_path / "gpu.md"
    (tmp_path / "sitecustomize.py").write_text(LACKING)
    # other processes may have the machine, and nothing is to be left out
    options = ["--device", "cpu", "--quick", "--minutes", "60", "--json", str(found), "--markdown", str(page)]
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}  # more would only wait for each other
    command = [sys.executable, "scripts/gpu_check.py", *options]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(found.read_text())
    assert report["ok"]
    assert len(report["checks"]) == 26
    assert [title.split(" (")[0] for title in report["figures"]] == [
        "Limits of the device",
        "LoRA op of one layer, tiny's shape, rank 16, bf16",
        "Attention of one layer, decoding, bf16",
        "LoRA op of one layer in training, tiny's shape, rank 16, bf16",
        "Cold boot",
        "Decode",
        "Training",
        "Denoiser",
    ]
    assert all(f["low"] <= f["median"] <= f["high"] for figures in report["figures"].values() for f in figures)
    assert not report["gpu"]
    assert report["took"].keys() >= {check["name"] for check in report["checks"]} | report["figures"].keys()
    assert list(report["seconds"]) == ["start", "checks", "limits and kernels", "a tiny model", "SDXL's denoiser"]
    assert report["left_out"] == []
    for text in (run.stdout, report["device"], page.read_text()):
        assert "no GPU used" in text
    for check in report["checks"]:
        assert check["name"] in page.read_text()


# what children are sent, which is found by its name


def breaks(name: str = "") -> Any:
    raise RuntimeError("it broke")


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hangs() -> None:
    time.sleep(3600)


def differs(name: str) -> Check:
    return Check(name, False, "it differs")


def right(name: str) -> Check:
    return Check(name, True, "it is right")


def figure() -> list[Figure]:
    return [Figure.of("a figure", "ms", [1.0, 2.0], "beside | it")]


def some_sections(*_: object) -> Iterator[Section]:
    yield "Limits of the device", lambda: Limits(1.0, 1.0, 1.0, figure())
    yield from {"some": figure, "no": breaks, "others": figure}.items()


def faults() -> Iterator[Section]:
    yield from {"first": lambda: 1, "dies": dies, "then": lambda: 2, "hangs": hangs, "last": lambda: 3}.items()


def no_sections(*_: object) -> Iterator[Section]:
    yield from breaks()


def without(monkeypatch: pytest.MonkeyPatch, *kinds: str) -> None:
    """No checks and figures of those kinds, and none of a denoiser."""
    monkeypatch.setitem(sys.modules, "diffusers", None)  # importing it raises ImportError
    for kind in kinds:
        monkeypatch.setattr(run, kind, lambda *_: [])


def test_a_check_that_fails_or_breaks_makes_it_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without(monkeypatch, "kernel_checks", "learning_checks")
    monkeypatch.setattr(run, "checks", lambda *_: [("one", breaks), ("another", differs), ("a third", right)])
    monkeypatch.setattr(run, "_kernels", no_sections)
    monkeypatch.setattr("sys.argv", ["gpu_check", "--device", "cpu", "--quick"])
    monkeypatch.setattr(gpu_check, "STARTED", time.monotonic())  # its time is not that of the tests before this one
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    assert ended.value.code == 1
    out = capsys.readouterr().out
    assert "WRONG  one: RuntimeError: it broke" in out
    assert "WRONG  another: it differs" in out
    assert "ok     a third: it is right" in out
    assert "WRONG  limits and kernels: RuntimeError: it broke" in out
    assert "Something is WRONG" in out


def test_figures_that_break_leave_the_others_and_what_was_found_by_then_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without(monkeypatch, "kernel_checks", "learning_checks", "checks", "shapes")
    monkeypatch.setattr(run, "_kernels", some_sections)
    report, page = Report(torch.device("cpu"), True, Clock(run.SHARES, 600.0)), tmp_path / "gpu.md"
    written: list[int] = []

    def write() -> None:
        report.write_markdown(page)
        written.append(len(report.figures))

    run.run(report, write)
    assert not report.ok
    assert [check.name for check in report.checks] == ["no"]
    assert list(report.figures) == ["Limits of the device", "some", "others"]
    assert written == [1, 2, 2, 3]
    assert "beside \\| it" in page.read_text()
    assert "Left out, for want of diffusers: SDXL's denoiser." in page.read_text()


def test_a_process_that_dies_or_hangs_takes_nothing_else_with_it() -> None:
    heard: list[Result] = []
    apart("all", faults, torch.device("cpu"), Clock({}, math.inf), 6.0, heard.append)
    assert [(result.title, result.value) for result in heard] == [
        ("first", 1), ("dies", None), ("then", 2), ("hangs", None), ("last", 3),
    ]  # fmt: skip
    assert [result.error for result in heard if result.error] == [
        "Its process died.",
        "It hangs: nothing came of it for 6 s.",
    ]


def test_what_may_be_left_out_is_left_out_once_its_share_of_the_time_is_used_up() -> None:
    now = 0.0
    clock = Clock({"first": 1, "second": 2, "third": 3}, 60.0, now=lambda: now)
    with clock.section("first"):
        now = 9.0
        assert clock.may("this")
        now = 12.0
        assert not clock.may("that")
        assert not clock.may("that")
    with clock.section("second"):  # until 30 s
        assert clock.may("something else")
        now = 29.0
    with clock.section("second"):
        assert clock.may("something else")
        now = 31.0
        assert not clock.may("something else")
    assert not clock.is_over("the third")
    with clock.section("third"):
        assert clock.may("what is left")  # nobody has used up its time
        now = 50.0
    assert clock.is_over("a fourth")
    assert clock.left_out == ["that", "something else", "a fourth"]
    assert clock.seconds == {"first": 12.0, "second": 19.0, "third": 19.0}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_checks_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_check"])
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    assert ended.value.code == 2
    assert "torch finds no GPU here" in capsys.readouterr().err
