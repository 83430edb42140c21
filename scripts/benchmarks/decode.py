"""Tokens per second of 1, 4, 16 and 32 streams, 64 new tokens each: the base alone, one adapter for all, and for each
stream an adapter of its own (rank 16 on all linears)."""

from __future__ import annotations

import statistics

from figure import Figure

from benchmarks.limits import memory_bandwidth
from benchmarks.load import Load, Round
from benchmarks.peers import Setting
from benchmarks.server import import_adapters, server

STREAMS = (1, 4, 16, 32)
TOKENS = 64
ROUNDS = 3


def run(setting: Setting) -> list[Figure]:
    figures = []
    with server() as running:
        adapters = import_adapters(running, max(STREAMS))
        models = [a["model"] for a in adapters]
        load = Load(running.url, running.key)
        base_bytes = running.tiers()["base"]["bytes"]
        bandwidth = memory_bandwidth()
        for streams in STREAMS:
            alone = 0.0
            for kind, asked in (("base", [running.base]), ("one adapter", models[:1]), ("all different", models)):
                rounds = load.rounds(asked, streams, TOKENS, ROUNDS)
                rate = statistics.median(r.rate for r in rounds)
                alone = alone or rate
                distinct = 0 if kind == "base" else min(len(asked), streams)
                step = (base_bytes + distinct * adapters[0]["bytes"]) / bandwidth
                note = (
                    f"{rate / alone:.0%} of base; {rate * step / streams:.0%} of the memory's limit; {_first(rounds)}"
                )
                figures.append(Figure.of(f"{streams} streams, {kind}", "tok/s", [r.rate for r in rounds], note))
    figures.append(Figure.of("memory bandwidth", "GB/s", [bandwidth / 1e9]))
    return figures + setting.peers_decode(TOKENS, ROUNDS)


def _first(rounds: list[Round]) -> str:
    return f"first token {statistics.median(r.first_ms for r in rounds):.0f} ms"
