"""What an adapter that is not on the device adds to the time to first token: one on disk, in the page cache and dropped
from it, and one in the RAM tier. And what such loads, one every 200 ms, do to the tokens of 16 others' streams."""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import httpx
import numpy as np
from figure import Figure

from adapterhub.config import MIB
from adapterhub.swap.block import SUFFIX
from adapterhub.swap.registry import Version
from benchmarks.limits import read_seconds
from benchmarks.load import Load, complete
from benchmarks.peers import Setting
from benchmarks.server import PROMPT, RANK, Server, server
from benchmarks.stored import publish

PAIRS = 40
STREAMS, TOKENS, ROUNDS = 16, 384, 4
EVERY_SECONDS = 0.2


def run(setting: Setting) -> list[Figure]:
    return [*_from_disk(), *_from_ram(), *_beside_streams(), *setting.peers_coldboot()]


def _from_disk() -> list[Figure]:
    made: list[Version] = []
    with server(prepare=lambda data: made.extend(publish(data, range(1), (RANK,)))) as running:
        [version] = made
        model, evict = version.alias, partial(running.evict, version.adapter)
        ask(running, model)  # its digest is checked once
        plain = [ask(running, version.base, "base") for _ in range(PAIRS)]
        limit = read_seconds(version.nbytes) * 1e3
        note = f"goal 5; one read of its {version.nbytes / MIB:.1f} MiB takes {limit:.2f}"
        cached = _pairs("on disk, in the page cache", running, model, "disk", evict, note)

        def evict_and_drop() -> None:
            running.evict(version.adapter)
            drop(running.data / "blobs" / f"{version.digest}{SUFFIX}")

        dropped = _pairs("on disk, not in the page cache", running, model, "disk", evict_and_drop, "goal 12")
    return [Figure.of("first token, base", "ms", plain), *cached, *dropped]


def _from_ram() -> list[Figure]:
    """Two adapters take turns in a pool for one; both are in RAM."""
    made: list[Version] = []
    budgets = ("--device-bytes", "10MiB", "--ram-bytes", "64MiB")
    with server(*budgets, prepare=lambda data: made.extend(publish(data, range(2), (RANK,)))) as running:
        one, other = (version.alias for version in made)
        ask(running, one)
        ask(running, other)
        return _pairs("in the RAM tier", running, one, "ram", lambda: ask(running, other, "ram"), "goal 2")


def _pairs(
    where: str, running: Server, model: str, tier: str, send_away: Callable[[], object], note: str
) -> list[Figure]:
    """Each a first token with the adapter on the device, and one after `send_away` took it to `tier`."""
    cold, warm = [], []
    for _ in range(PAIRS):
        ask(running, model)
        warm.append(ask(running, model, "device"))
        send_away()
        cold.append(ask(running, model, tier))
    added = [c - w for c, w in zip(cold, warm, strict=True)]
    return [
        Figure.of(f"first token, adapter {where}", "ms", cold, f"on the device {np.median(warm):.4g}"),
        Figure.of("added by that", "ms", added, note),
    ]


def ask(running: Server, model: str, tier: str | None = None) -> float:
    """Milliseconds to the first token."""
    answer = Load(running.url, running.key).one(model, 1, PROMPT)
    if tier not in (None, answer.tier):
        raise SystemExit(f"{model} came from {answer.tier}, not from {tier}")
    return answer.first * 1e3


def drop(path: Path) -> None:
    """Takes a file out of the page cache; whatever lies below the file system may have a cache of its own."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if (left := _cached(path)) > 0.01:
        raise SystemExit(f"{left:.0%} of {path} stay in the page cache; nothing can be said of reading it from disk")


def _cached(path: Path) -> float:
    """The share of a file's pages that are in the page cache; does not touch them."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(mapped)
        if ctypes.CDLL(None, use_errno=True).mincore(ctypes.byref(start), ctypes.c_size_t(len(mapped)), pages):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        del start
        return sum(page & 1 for page in pages) / len(pages)


def _beside_streams() -> list[Figure]:
    """Rounds take turns: nothing else runs; a request for a warm adapter every 200 ms; one for a cold adapter. The
    warm rounds evict too, an adapter that is not there, so that the load is all that the cold ones add."""
    made: list[Version] = []
    kinds: dict[str, list[float]] = {"nothing": [], "a warm request": [], "a cold boot": []}
    with server(prepare=lambda data: made.extend(publish(data, range(STREAMS + 2), (RANK,)))) as running:
        streams, visitor, absent = made[:STREAMS], made[STREAMS], made[STREAMS + 1]
        asyncio.run(_round(running, streams, None, None))
        evicted = {"nothing": None, "a warm request": absent, "a cold boot": visitor}
        visits = 0
        for _ in range(ROUNDS):
            for kind, gone in evicted.items():
                gaps, visits = asyncio.run(_round(running, streams, gone and visitor, gone))
                kinds[kind].append(float(np.percentile(gaps, 99)) * 1e3)
    nothing, warm, cold = kinds.values()
    notes = {
        "a warm request": f"{_grown(nothing, warm)} to nothing beside",
        "a cold boot": f"{_grown(nothing, cold)} to nothing beside, {_grown(warm, cold)} to a warm request, goal under "
        f"+10%; {visits} in a round",
    }
    return [
        Figure.of(f"{STREAMS} streams' token p99, {kind} beside", "ms", p99, notes.get(kind, ""))
        for kind, p99 in kinds.items()
    ]


def _grown(before: list[float], after: list[float]) -> str:
    """From round to round."""
    return f"{np.median([a / b - 1 for b, a in zip(before, after, strict=True)]):+.0%}"


async def _round(
    running: Server, streams: list[Version], visitor: Version | None, evicted: Version | None
) -> tuple[list[float], int]:
    """All gaps between the streams' tokens, in seconds, and how many visits there were meanwhile."""
    async with Load(running.url, running.key).connect() as client:
        visits = asyncio.create_task(_visits(client, visitor, evicted)) if visitor and evicted else None
        answers = await asyncio.gather(*(complete(client, version.alias, TOKENS) for version in streams))
        count = 0
        if visits is not None:
            visits.cancel()
            count = await visits
    return [gap for answer in answers for gap in answer.gaps], count


async def _visits(client: httpx.AsyncClient, visitor: Version, evicted: Version) -> int:
    """A request for one token of `visitor` every 200 ms, after `evicted` has been sent away; until cancelled."""
    count = 0
    try:
        while True:
            await asyncio.sleep(EVERY_SECONDS)
            answer = await client.post(f"/admin/adapters/{evicted.adapter}/evict")
            answer.raise_for_status()
            await complete(client, visitor.alias, 1)
            count += 1
    except asyncio.CancelledError:
        return count
