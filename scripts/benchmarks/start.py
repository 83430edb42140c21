"""From the command `adapterhub serve` to `/healthz` answering; the base is converted and the kernels are built."""

from __future__ import annotations

from figure import Figure

from benchmarks.peers import Setting
from benchmarks.server import server

RUNS = 3


def run(_: Setting) -> list[Figure]:
    with server():
        pass  # converts, builds, and warms the page cache
    seconds = []
    for _ in range(RUNS):
        with server() as running:
            seconds.append(running.start_seconds)
    return [Figure.of("start to /healthz", "s", seconds, "asked for: at most 15")]
