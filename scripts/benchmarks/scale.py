"""16 streams on 10 adapters while 10, and then 10,000, adapters are registered (of rank 1 on q, to fit on a disk)."""

from __future__ import annotations

import statistics

from figure import Figure

from benchmarks.load import Load
from benchmarks.peers import Setting
from benchmarks.server import import_adapters, server

COUNTS = (10, 10_000)
STREAMS, TOKENS, ROUNDS = 16, 64, 5


def run(_: Setting) -> list[Figure]:
    figures: list[Figure] = []
    with server() as running:
        load = Load(running.url, running.key)
        models: list[str] = []
        for count in COUNTS:
            fresh = import_adapters(running, count, (1,), ("q_proj",), begin=len(models))
            models += [a["model"] for a in fresh]
            rates = [r.rate for r in load.rounds(models[:10], STREAMS, TOKENS, ROUNDS)]
            note = f"{statistics.median(rates) / figures[0].median:.0%} of that with {COUNTS[0]}" if figures else ""
            figures.append(Figure.of(f"{count} registered, 16 streams on 10", "tok/s", rates, note))
            figures.append(Figure.of(f"{count} registered, resident set", "MiB", [running.resident_mib()]))
    return figures
