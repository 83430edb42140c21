"""Prompt tokens per second, one prompt at a time and new each time: the base, and an adapter of rank 16."""

from __future__ import annotations

import random

from figure import Figure

from benchmarks.limits import matrix_rate
from benchmarks.load import Load
from benchmarks.peers import Setting
from benchmarks.server import import_adapters, server

LENGTHS = (128, 1024)
ROUNDS = 5


def run(_: Setting) -> list[Figure]:
    figures = []
    chooser = random.Random(0)
    with server() as running:
        [adapter] = import_adapters(running, 1)
        load = Load(running.url, running.key)
        parameters = running.client.get("/admin/tiers").json()["base"]["bytes"] / 2
        limit = matrix_rate(256) / (2 * parameters)
        for length in LENGTHS:
            for kind, model in (("base", running.base), ("adapter", adapter["model"])):
                rates = []
                for _ in range(ROUNDS):
                    prompt = [chooser.randrange(1000, 40_000) for _ in range(length)]
                    rates.append(length / load.one(model, 1, prompt).first)
                note = f"{max(rates) / limit:.0%} of torch's matrix rate"
                figures.append(Figure.of(f"{length} tokens, {kind}", "tok/s", rates, note))
    return figures
