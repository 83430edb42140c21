"""Resident set after the start, and with 16 adapters of rank 16 on the device, each used."""

from __future__ import annotations

from figure import Figure

from benchmarks.load import Load
from benchmarks.peers import Setting
from benchmarks.server import import_adapters, server

ADAPTERS = 16


def run(_: Setting) -> list[Figure]:
    with server() as running:
        empty = running.resident_mib()
        adapters = import_adapters(running, ADAPTERS)
        Load(running.url, running.key).rounds([a["model"] for a in adapters], ADAPTERS, 16, 1)
        on_device = running.tiers()["tiers"]["device"]["adapters"]
        if on_device != ADAPTERS:
            raise SystemExit(f"{on_device} adapters are on the device, not {ADAPTERS}")
        full = running.resident_mib()
    return [
        Figure.of("resident set, no adapter", "MiB", [empty]),
        Figure.of(f"resident set, {ADAPTERS} adapters on the device", "MiB", [full], "asked for: under 1229"),
    ]
