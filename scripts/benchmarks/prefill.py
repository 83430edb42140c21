"""Prompt tokens per second, one prompt at a time and new each time: the base, and an adapter of rank 16. All contenders
take turns; "3x PEFT" is a ratio of medians."""

from __future__ import annotations

import random
from functools import partial

from figure import Figure

from benchmarks.limits import matrix_rate
from benchmarks.load import Load, Round
from benchmarks.peers import Peer, Setting
from benchmarks.server import import_adapters, server
from benchmarks.turns import Case, ratios, take_turns

LENGTHS = (128, 1024)
ROUNDS = 5
chooser = random.Random(0)


def run(setting: Setting) -> list[Figure]:
    with server() as running, setting.peers(1) as peers:
        [adapter] = import_adapters(running, 1)
        load = Load(running.url, running.key)
        limit = matrix_rate(256) / running.tiers()["base"]["bytes"]  # two operations and two bytes per parameter
        figures = []
        for length in LENGTHS:
            cases = [
                Case("", f"{length} tokens, {kind}", partial(ask_server, load, model, length))
                for kind, model in (("base", running.base), ("adapter", adapter["model"]))
            ]
            for peer in peers:
                for kind, number in (("base", None), ("adapter", 0)):
                    cases.append(Case(peer.name, f"{length} tokens, {kind}", partial(ask_peer, peer, number, length)))
            take_turns(cases, ROUNDS)

            def rate(done: Round, length: int = length) -> float:
                return length / done.answers[0].first

            for case in cases:
                reached = f"{case.median(rate) / limit:.0%} of torch's matrix rate"
                beside = "" if case.who else ratios(case, cases, rate)
                note = "; ".join(filter(None, (beside, reached)))
                figures.append(Figure.of(case.name, "tok/s", case.values(rate), note))
    return figures


def ask_server(load: Load, model: str, length: int) -> Round:
    return load.round([model], 1, new_prompt(length))


def ask_peer(peer: Peer, adapter: int | None, length: int) -> Round:
    return peer.ask([adapter], 1, new_prompt(length))


def new_prompt(length: int) -> list[int]:
    return [chooser.randrange(1000, 40_000) for _ in range(length)]
