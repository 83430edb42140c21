"""`scripts/gpu_check` itself, on a CPU and without the packages that a machine with a GPU need not have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
WITHOUT = """
import runpy, sys
for name in ("fastapi", "starlette", "uvicorn", "python_multipart", "sqlite_utils", "typer", "rich", "gguf", "openai"):
    sys.modules[name] = None  # importing it raises ImportError
sys.argv[0] = "scripts/gpu_check.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_it_checks_and_measures_where_only_torch_transformers_and_peft_are(tmp_path: Path) -> None:
    found, page = tmp_path / "found.json", tmp_path / "gpu.md"
    options = ["--device", "cpu", "--quick", "--json", str(found), "--markdown", str(page)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "scripts")])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}  # more would only wait for each other
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT, *options], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(found.read_text())
    assert report["ok"]
    assert len(report["checks"]) == 10
    assert [title.split(" (")[0] for title in report["figures"]] == [
        "Limits of the device",
        "Cold boot",
        "Decode",
        "Training",
    ]
    assert all(f["low"] <= f["median"] <= f["high"] for figures in report["figures"].values() for f in figures)
    assert not report["gpu"]
    for text in (run.stdout, report["device"], page.read_text()):
        assert "no GPU used" in text
    for check in report["checks"]:
        assert check["name"] in page.read_text()


def test_a_check_that_fails_or_breaks_makes_it_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import gpu_check
    from gpu.report import Check

    def broken(*_: object) -> Check:
        raise RuntimeError("it broke")

    for check in (broken, lambda name: Check(name, False, "it differs"), lambda name: Check(name, True, "it is right")):
        monkeypatch.setattr(gpu_check, "checks", lambda *_, check=check: [("the check", check)])
        monkeypatch.setattr(gpu_check, "measure_limits", broken)
        monkeypatch.setattr("sys.argv", ["gpu_check", "--device", "cpu", "--quick"])
        with pytest.raises(SystemExit) as ended:
            gpu_check.main()
        assert ended.value.code == 1
    out = capsys.readouterr().out
    assert "WRONG  the check: RuntimeError: it broke" in out
    assert "WRONG  the check: it differs" in out
    assert "ok     the check: it is right" in out
    assert out.count("WRONG  figures: RuntimeError: it broke") == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_checks_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import gpu_check

    monkeypatch.setattr("sys.argv", ["gpu_check"])
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    assert ended.value.code == 2
    assert "torch finds no GPU here" in capsys.readouterr().err
