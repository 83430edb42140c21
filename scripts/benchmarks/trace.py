"""A trace of Gamma arrivals over many adapters (S-LoRA's generator, and Zipf): ranks 8 to 64 mixed, on q and v, more of
them than the device's pool holds. Prompts and answers are uniform in [8, 64) tokens, so that two cores keep up. Of
10,000 adapters only those that are asked for are written: all together would be 35 GB.

Beside peers, a trace that they can follow: ten adapters of rank 16 on all linears, and no more than the pool holds. A
peer that is a library answers one request after the other, in the order in which they come.

And what a replay of the server's own trace says of its hits, beside what the server counted: for each policy, 3,000
requests in four streams by Zipf's law over 2,000 adapters of ranks 1, 2 and 4 on q, with room for 32 of them on the
device and for 256 in RAM."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from figure import Figure

from adapterhub.swap.frames import Trace, read_trace
from adapterhub.swap.generate import power, zipf
from adapterhub.swap.policies import Policy
from adapterhub.swap.registry import Version
from adapterhub.swap.simulate import Budgets, simulate
from adapterhub.swap.simulate import Setting as Replayed
from benchmarks.limits import memory_bandwidth
from benchmarks.load import Answer, Load, complete, replay, requests
from benchmarks.peers import Setting
from benchmarks.server import RANK, Server, base, chosen, import_adapters, server
from benchmarks.stored import publish

RANKS = (64, 32, 16, 8)
ADAPTERS = (10, 100, 1000, 10_000)
ALL_WRITTEN = 1000  # of more adapters than that only those that are asked for
REQUESTS = 150
PEER_ADAPTERS, PEER_REQUESTS = 10, 60
POOL = "128MiB"
ATTAINED_SECONDS = 6.0
TARGETS = ("q_proj", "v_proj")

COUNTED_ADAPTERS, COUNTED_REQUESTS, SKEW = 2000, 3000, 1.0
COUNTED_RANKS, COUNTED_TARGETS = (1, 2, 4), ("q_proj",)
ON_DEVICE, IN_RAM = 32, 256  # adapters
STREAMS = 4
POLICIES = tuple(Policy)
RECORDED_SECONDS = 30  # by when the last use should be in the trace


def run(setting: Setting) -> list[Figure]:
    figures: list[Figure] = []
    curves: dict[str, list[float]] = {}
    for count in ADAPTERS:
        for title, answers in _replayed(count).items():
            curves[title] = sorted(a.first * 1e3 for a in answers)
            figures.append(_figure(title, answers))
    if setting.plots is not None:
        plot(curves, setting.plots / "trace.png")
    figures += _beside_peers(setting)
    return [*figures, *(figure for policy in POLICIES for figure in _counted(policy))]


def _beside_peers(setting: Setting) -> list[Figure]:
    """All follow one trace, one contender after the other."""
    picks, asked = power(PEER_ADAPTERS, PEER_REQUESTS, 0.3).tolist(), requests(PEER_REQUESTS)
    title = f"{PEER_ADAPTERS} adapters of rank {RANK}, alpha 0.3"
    with server() as running, setting.peers(PEER_ADAPTERS) as peers:
        models = [adapter["model"] for adapter in import_adapters(running, PEER_ADAPTERS)]
        ours = asyncio.run(replay(Load(running.url, running.key), [models[pick] for pick in picks], asked))
        theirs = {peer.name: peer.follow(picks, asked) for peer in peers}
    first = statistics.median(a.first for a in ours)
    compared = [
        f"{statistics.median(a.first for a in answers) / first:.3g}x at {name}" for name, answers in theirs.items()
    ]
    least = f"{base().nbytes / memory_bandwidth() * 1e3:.2g} ms to read the base"
    figures = [_figure(title, ours, least, *compared)]
    return figures + [_figure(f"{name}: {title}", answers) for name, answers in theirs.items()]


def _replayed(count: int) -> dict[str, list[Answer]]:
    """By what was asked for."""
    laws = {"alpha 0.3": power(count, REQUESTS, 0.3), "Zipf 1.0": zipf(count, REQUESTS, 1.0)}
    asked = np.unique(np.concatenate(list(laws.values()))).tolist()
    written = range(count) if count <= ALL_WRITTEN else asked
    made: list[Version] = []
    with server("--device-bytes", POOL, prepare=lambda data: made.extend(publish(data, written, RANKS, TARGETS))) as it:
        models = {index: version.alias for index, version in zip(written, made, strict=True)}
        there = "" if len(made) == count else f" ({len(made)} of them written)"
        return {
            f"{count} adapters{there}, {law}": asyncio.run(
                replay(Load(it.url, it.key), [models[i] for i in picks.tolist()], requests(REQUESTS))
            )
            for law, picks in laws.items()
        }


def _counted(policy: Policy) -> list[Figure]:
    """Hits of the device and of RAM as the server counts them, beside those of a replay of its trace."""
    layout, made = chosen(COUNTED_TARGETS), list[Version]()
    size = sum(layout.numel(rank) * base().dtype.itemsize for rank in COUNTED_RANKS) // len(COUNTED_RANKS)
    budgets = Budgets(ON_DEVICE * size, IN_RAM * size)
    replayed = Replayed(budgets, policy)
    options = ("--device-bytes", str(budgets.device), "--ram-bytes", str(budgets.ram))
    indices = range(COUNTED_ADAPTERS)
    with server(*options, prepare=lambda d: made.extend(publish(d, indices, COUNTED_RANKS, COUNTED_TARGETS))) as it:
        rules = {tier: {"policy": policy} for tier in ("device", "ram")}
        it.client.put("/admin/policy", json=rules).raise_for_status()
        picks = zipf(COUNTED_ADAPTERS, COUNTED_REQUESTS, SKEW).tolist()
        asyncio.run(_ask_in_streams(it, [made[i].alias for i in picks]))
        tiers = it.tiers()["tiers"]
        outcome = simulate(_recorded(it, COUNTED_REQUESTS), budgets, replayed.rules)
    name = f"Zipf {SKEW} over {COUNTED_ADAPTERS}, {policy}"
    figures = []
    for tier, predicted in (("device", outcome.device_hits), ("ram", outcome.ram_hits)):
        shares = [100 * hits / COUNTED_REQUESTS for hits in (tiers[tier]["hits"], predicted)]
        note = f"a replay of its trace says {shares[1]:.2f}: {shares[0] - shares[1]:+.2f} points"
        figures.append(Figure.of(f"{name}: found in {tier}", "%", shares[:1], note))
    return figures


async def _ask_in_streams(running: Server, models: Sequence[str]) -> None:
    """One token of each model in turn, by whichever stream is free."""
    left = iter(models)

    async with Load(running.url, running.key).connect() as client:

        async def stream() -> None:
            for model in left:
                await complete(client, model, 1)

        await asyncio.gather(*(stream() for _ in range(STREAMS)))


def _recorded(running: Server, uses: int) -> Trace:
    """The server's trace, once all of `uses` are in it."""
    deadline = time.monotonic() + RECORDED_SECONDS
    while len(trace := read_trace(running.data / "trace")) < uses:
        if time.monotonic() > deadline:
            raise SystemExit(f"after {RECORDED_SECONDS} s the trace has {len(trace)} of {uses} uses")
        time.sleep(0.1)
    return trace


def plot(curves: dict[str, list[float]], path: Path) -> None:
    """What share of requests had their first token within how long, one curve for each setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for title, first in curves.items():
        axes.step(first, np.arange(1, len(first) + 1) / len(first), where="post", label=title)
    axes.set(xscale="log", xlabel="time to first token (ms)", ylabel="share of requests", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def _figure(name: str, answers: list[Answer], *beside: str) -> Figure:
    first = sorted(a.first * 1e3 for a in answers)
    attained = sum(a.first < ATTAINED_SECONDS for a in answers) / len(answers)
    notes = [f"p99 {first[int(len(first) * 0.99)]:.0f}", f"under {ATTAINED_SECONDS:g} s {attained:.0%}"]
    if any(a.tier for a in answers):  # a peer says nothing of that
        notes.append(f"on the device {sum(a.tier == 'device' for a in answers) / len(answers):.0%}")
    notes.append(f"{statistics.median(a.per_token for a in answers) * 1e3:.0f} ms per token")
    return Figure.of(f"{name}: first token", "ms", first, "; ".join([*notes, *beside]))
