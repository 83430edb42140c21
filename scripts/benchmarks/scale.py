"""The same server with 10, and with 10,000, adapters registered (of rank 1 on q, to fit on a disk): its start, lists
of adapters, cold boots, 16 streams on 10 adapters, and its resident set. Both have their pool, which holds ten, and
their KV cache filled, by as many distinct prompts, so that what one takes more is for what is registered and was used.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import numpy as np
from figure import Figure

from adapterhub.config import MIB
from adapterhub.swap.allocator import aligned
from adapterhub.swap.registry import Version
from benchmarks.coldboot import ask
from benchmarks.load import Load
from benchmarks.peers import Setting
from benchmarks.server import COMMAND, PROMPT, Server, base, chosen, server
from benchmarks.stored import publish

COUNTS = (10, 10_000)
RANK, TARGETS = 1, ("q_proj",)
FILLING = 10  # adapters that fill the pool
KV = 64 * MIB
STREAMS, TOKENS, ROUNDS = 16, 64, 5
LISTS = 10
COLD, COLD_ROUNDS = 100, 6  # cold boots in a round, and rounds
ASKED = 1500  # distinct prompts, of as many adapters as there are, before the resident set is read
WORDS = 8 * PROMPT  # a few KV blocks
OVER = 1.1  # times its budgets, which the resident set may reach


class Side(NamedTuple):
    """A server, the adapters that are registered with it, and its resident set before any was used, in MiB."""

    running: Server
    made: list[Version]
    unused: float


def run(_: Setting) -> list[Figure]:
    figures: list[Figure] = []
    first: dict[str, float] = {}
    with ExitStack() as stack:
        sides = [stack.enter_context(_registered(count)) for count in COUNTS]
        cold = _cold_boots(sides)
        for count, side, times in zip(COUNTS, sides, cold, strict=True):
            for figure in _measure(side, times, sides[0].unused):
                beside = (
                    f"{figure.median / first[figure.name]:.0%} of that with {COUNTS[0]}" if figure.name in first else ""
                )
                first.setdefault(figure.name, figure.median)
                notes = ", ".join(filter(None, (figure.note, beside)))
                named = (f"{count} registered: {figure.name}", figure.unit, figure.median, figure.low, figure.high)
                figures.append(Figure(*named, figure.runs, notes))
    return figures


@contextmanager
def _registered(count: int) -> Iterator[Side]:
    made: list[Version] = []
    pool = FILLING * aligned(chosen(TARGETS).numel(RANK) * base().dtype.itemsize)
    budgets = ("--device-bytes", str(pool), "--kv-bytes", str(KV))
    with server(*budgets, prepare=lambda data: made.extend(publish(data, range(count), (RANK,), TARGETS))) as running:
        yield Side(running, made, running.resident_mib())


def _cold_boots(sides: Sequence[Side]) -> list[list[list[float]]]:
    """Of each server, by rounds, milliseconds. The servers take turns, round by round: what the machine does meanwhile,
    which makes more of a p99 than anything else, is the same for both."""
    chooser = np.random.default_rng(0)
    times: list[list[list[float]]] = [[] for _ in sides]
    picks = [
        [side.made[i] for i in chooser.choice(len(side.made), min(len(side.made), COLD), replace=False)]
        for side in sides
    ]
    for _ in range(COLD_ROUNDS):
        for side, picked, found in zip(sides, picks, times, strict=True):
            found.append([_cold(side.running, picked[i % len(picked)]) for i in range(COLD)])
    return times


def _measure(side: Side, cold: list[list[float]], program: float) -> list[Figure]:
    """`program`: the resident set of the server with the fewest adapters before any was used, in MiB."""
    running, made, unused = side
    load = Load(running.url, running.key)
    rates = [r.rate for r in load.rounds([v.alias for v in made[:FILLING]], STREAMS, TOKENS, ROUNDS)]
    _fill(side)
    budget = sum(running.tiers()["tiers"][tier]["budget_bytes"] for tier in ("device", "ram")) + KV
    most = program + OVER * budget / MIB
    lists = ("", "--limit 0", "--tier device", "--sort last_use")
    page = [_get(running, "/v1/adapters?limit=100") for _ in range(LISTS)]
    p99 = [float(np.percentile(times, 99)) for times in cold]
    return [
        Figure.of("start", "s", [running.start_seconds], "goal 20"),
        Figure.of("GET /v1/adapters?limit=100", "ms", page),
        Figure.of("GET /v1/adapters, all", "ms", [_get(running, "/v1/adapters") for _ in range(LISTS)]),
        *(
            Figure.of(
                f"adapterhub adapters list --all {options}".rstrip(),
                "ms",
                [_list(running, *options.split()) for _ in range(LISTS)],
                "goal 300",
            )
            for options in lists
        ),
        Figure.of("first token of a cold boot", "ms", [ms for times in cold for ms in times]),
        Figure.of("first token of a cold boot, p99", "ms", p99, f"of each {COLD} cold boots"),
        Figure.of(f"{STREAMS} streams on 10", "tok/s", rates),
        Figure.of("resident set, no adapter used yet", "MiB", [unused]),
        Figure.of(
            "resident set, pool and KV cache full",
            "MiB",
            [running.resident_mib()],
            f"goal at most {most:.0f}: {program:.0f} of the program and its base with {COUNTS[0]} before any was used, "
            f"and {OVER:g} times budgets of {budget / MIB:.1f} (pool, KV cache, RAM tier)",
        ),
    ]


def _fill(side: Side) -> None:
    """Fills the pool and the KV cache, by the same prompts whatever is registered."""
    running, made, _ = side
    load = Load(running.url, running.key)
    for number in range(ASKED):
        load.one(made[number % len(made)].alias, 1, f"{number}. {WORDS}")
    device = running.tiers()["tiers"]["device"]
    if device["used_bytes"] != device["budget_bytes"]:
        raise SystemExit(f"the pool holds {device['used_bytes']} of {device['budget_bytes']} bytes")


def _cold(running: Server, version: Version) -> float:
    """Milliseconds to the first token, of an adapter that was read once before, and sent away."""
    ask(running, version.alias)
    running.evict(version.adapter)
    return ask(running, version.alias, "disk")


def _get(running: Server, path: str) -> float:
    started = time.perf_counter()
    running.client.get(path).raise_for_status()
    return (time.perf_counter() - started) * 1e3


def _list(running: Server, *options: str) -> float:
    account = {"ADAPTERHUB_URL": running.url, "ADAPTERHUB_API_KEY": running.key}
    started = time.perf_counter()
    command: Sequence[str] = [str(COMMAND), "adapters", "list", "--all", *options]
    subprocess.run(command, check=True, env={**os.environ, **account}, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - started) * 1e3
