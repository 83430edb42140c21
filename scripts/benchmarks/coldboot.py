"""What an adapter that is on disk (in the page cache), but not on the device, adds to the time to first token."""

from __future__ import annotations

from figure import Figure

from adapterhub.config import MIB
from benchmarks.limits import read_seconds
from benchmarks.load import Answer, Load
from benchmarks.peers import Setting
from benchmarks.server import PROMPT, Server, import_adapters, server

PAIRS = 40


def run(_: Setting) -> list[Figure]:
    with server() as running:
        [adapter] = import_adapters(running, 1)
        model, base = adapter["model"], adapter["base"]
        ask(running, model)
        cold, warm, plain = [], [], []
        for _ in range(PAIRS):
            plain.append(ask(running, base, "base").first * 1e3)
            warm.append(ask(running, model, "device").first * 1e3)
            running.evict(adapter)
            cold.append(ask(running, model, "disk").first * 1e3)
        size = adapter["bytes"]
    added = [c - w for c, w in zip(cold, warm, strict=True)]
    limit = read_seconds(size) * 1e3
    return [
        Figure.of("first token, base", "ms", plain),
        Figure.of("first token, adapter on the device", "ms", warm),
        Figure.of("first token, adapter on disk", "ms", cold),
        Figure.of("added by the cold boot", "ms", added, f"one read of its {size / MIB:.1f} MiB takes {limit:.2f}"),
    ]


def ask(running: Server, model: str, tier: str | None = None) -> Answer:
    answer = Load(running.url, running.key).one(model, 1, PROMPT)
    if tier not in (None, answer.tier):
        raise SystemExit(f"{model} came from {answer.tier}, not from {tier}")
    return answer
