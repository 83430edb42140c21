"""The same server with 10, and with 10,000, adapters registered (of rank 1 on q, to fit on a disk): its start, lists
of adapters, cold boots, 16 streams on 10 adapters, and its resident set after more were used than its pool holds."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence

import numpy as np
from figure import Figure

from adapterhub.config import MIB
from adapterhub.swap.registry import Version
from benchmarks.coldboot import ask
from benchmarks.load import Load
from benchmarks.peers import Setting
from benchmarks.server import COMMAND, Server, server
from benchmarks.stored import publish

COUNTS = (10, 10_000)
DEVICE, KV = 64 * MIB, 64 * MIB
STREAMS, TOKENS, ROUNDS = 16, 64, 5
LISTS = 10
COLD = 200  # cold boots
USED = 1500  # of the adapters, before the resident set is read: more than the pool holds


def run(_: Setting) -> list[Figure]:
    figures: list[Figure] = []
    first: dict[str, float] = {}
    for count in COUNTS:
        for figure in _measure(count):
            beside = (
                f"{figure.median / first[figure.name]:.0%} of that with {COUNTS[0]}" if figure.name in first else ""
            )
            first.setdefault(figure.name, figure.median)
            notes = ", ".join(filter(None, (figure.note, beside)))
            named = (f"{count} registered: {figure.name}", figure.unit, figure.median, figure.low, figure.high)
            figures.append(Figure(*named, figure.runs, notes))
    return figures


def _measure(count: int) -> list[Figure]:
    made: list[Version] = []
    budgets = ("--device-bytes", str(DEVICE), "--kv-bytes", str(KV))
    with server(*budgets, prepare=lambda data: made.extend(publish(data, range(count), (1,), ("q_proj",)))) as running:
        chooser = np.random.default_rng(0)
        picks = [made[i] for i in chooser.choice(count, min(count, COLD), replace=False)]
        cold = [_cold(running, picks[i % len(picks)]) for i in range(COLD)]
        load = Load(running.url, running.key)
        rates = [r.rate for r in load.rounds([v.alias for v in made[:10]], STREAMS, TOKENS, ROUNDS)]
        for version in made[:USED]:
            ask(running, version.alias)
        stats = running.tiers()
        budget = stats["base"]["bytes"] + DEVICE + KV + stats["tiers"]["ram"]["budget_bytes"]
        held = f"of budgets of {budget / MIB:.0f} (base, pool, KV cache, RAM tier) and the program"
        page = [_get(running, "/v1/adapters?limit=100") for _ in range(LISTS)]
        return [
            Figure.of("start", "s", [running.start_seconds], "goal 20"),
            Figure.of("GET /v1/adapters?limit=100", "ms", page),
            Figure.of("GET /v1/adapters, all", "ms", [_get(running, "/v1/adapters") for _ in range(LISTS)]),
            Figure.of("adapterhub adapters list", "ms", [_list(running) for _ in range(LISTS)], "goal 300"),
            Figure.of("first token of a cold boot", "ms", cold, f"p99 {np.percentile(cold, 99):.4g}"),
            Figure.of(f"{STREAMS} streams on 10", "tok/s", rates),
            Figure.of("resident set", "MiB", [running.resident_mib()], held),
        ]


def _cold(running: Server, version: Version) -> float:
    """Milliseconds to the first token, of an adapter that was read once before, and sent away."""
    ask(running, version.alias)
    running.evict(version.adapter)
    return ask(running, version.alias, "disk")


def _get(running: Server, path: str) -> float:
    started = time.perf_counter()
    running.client.get(path).raise_for_status()
    return (time.perf_counter() - started) * 1e3


def _list(running: Server) -> float:
    account = {"ADAPTERHUB_URL": running.url, "ADAPTERHUB_API_KEY": running.key}
    started = time.perf_counter()
    command: Sequence[str] = [str(COMMAND), "adapters", "list", "--all"]
    subprocess.run(command, check=True, env={**os.environ, **account}, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - started) * 1e3
