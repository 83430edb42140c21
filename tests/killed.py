"""A process that says what it does, killed at some moment."""

from __future__ import annotations

import subprocess
import sys
import time


def said_until_killed(code: str, *arguments: str, seconds: float) -> list[str]:
    """The whole lines that `code` printed from "ready" until its kill so long after it. Python may write a line in
    several parts (it does where PYTHONUNBUFFERED is set), so that the kill can leave a piece of one: nobody was told
    that."""
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            time.sleep(seconds)
        finally:
            process.kill()
        said = process.stdout.read()
    return said[: said.rfind("\n") + 1].splitlines()
