"""What the control groups of this process, of a container or a systemd unit, let it take of the machine.

Version 2 of them: https://docs.kernel.org/admin-guide/cgroup-v2.html
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

PROC, ROOT = Path("/proc"), Path("/sys/fs/cgroup")


def groups(proc: Path = PROC, root: Path = ROOT) -> list[Path]:
    """The directories of its own group and of those around it, whose limits hold for it, too. Inside a container its
    own may look like the root."""
    own = Path()
    with suppress(OSError):
        for line in (proc / "self/cgroup").read_text().splitlines():
            if line.startswith("0::/"):
                own = Path(line.removeprefix("0::/"))
    return [root / path for path in (own, *own.parents)]


def usable_cores(proc: Path = PROC, root: Path = ROOT) -> int:
    """How many threads can be at work all the time: as many as the cores that the process is bound to, and no more than
    the whole cores that its groups have time for. One more would be stopped for a while in every period, and those that
    wait for it with it."""
    found = [len(os.sched_getaffinity(0))]
    for group in groups(proc, root):
        with suppress(OSError, ValueError):  # "max" is no number: no limit
            quota, period = map(int, (group / "cpu.max").read_text().split())
            found.append(quota // period)
    return max(1, min(found))
