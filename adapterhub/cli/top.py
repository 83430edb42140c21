"""`adapterhub top`: a server's tiers, load and busiest adapters, live."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Group
from rich.live import Live

from adapterhub.cli.client import DEFAULT_URL, Client, Key, Url, console, print_json, table_of
from adapterhub.cli.devices import shortage
from adapterhub.cli.formats import ago, percent, size
from adapterhub.cli.tiers import tiers_table
from adapterhub.config import format_bytes


class Rates(NamedTuple):
    """What happened each second, between two looks."""

    tokens: float
    hits: float  # adapters that requests found on the device
    loads: float  # adapters that were brought there


def top(
    once: Annotated[
        bool, typer.Option("--once", help="Look once, and end; so it does where the output is no terminal.")
    ] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    rows: Annotated[int, typer.Option(min=1, max=1000, help="How many adapters to show.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: a line for each look, or once one object.")] = (
        False
    ),
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Watch a server: its tiers, its load, and the adapters that were used last. Ctrl-C ends it. Needs an admin key."""
    client = Client(url, key)
    if once or not (as_json or console.is_terminal):
        seen = _look(client, rows)
        print_json(seen) if as_json else console.print(_view(seen, None))
        return
    with suppress(KeyboardInterrupt):
        if as_json:
            for seen, rates in _watch(client, rows, interval):
                line = {**seen, "per_second": rates and rates._asdict()}
                print(json.dumps(line, ensure_ascii=False), flush=True)
            return
        with Live(console=console, screen=True, auto_refresh=False) as live:
            for seen, rates in _watch(client, rows, interval):
                live.update(_view(seen, rates), refresh=True)


def _look(client: Client, rows: int) -> dict[str, Any]:
    """The server's own words: base, engine, tiers, trace, and the adapters that were used last."""
    adapters = client.get("/admin/adapters", sort="-last_use", limit=rows)
    return {**client.get("/admin/tiers"), "adapters": adapters["data"], "adapters_total": adapters["total"]}


def _watch(client: Client, rows: int, interval: float) -> Iterator[tuple[dict[str, Any], Rates | None]]:
    """A look each `interval` seconds, with the rates since the one before."""
    before: dict[str, Any] | None = None
    then = 0.0
    while True:
        seen, now = _look(client, rows), time.monotonic()
        yield seen, None if before is None else _rates(before, seen, now - then)
        before, then = seen, now
        time.sleep(interval)


def _rates(before: dict[str, Any], after: dict[str, Any], seconds: float) -> Rates:
    """Of counters, which start again with a server."""

    def rate(group: dict[str, Any], earlier: dict[str, Any], name: str) -> float:
        return max(0, group[name] - earlier[name]) / seconds

    device, device_before = after["tiers"]["device"], before["tiers"]["device"]
    return Rates(
        rate(after["engine"], before["engine"], "tokens"),
        rate(device, device_before, "hits"),
        rate(device, device_before, "loads"),
    )


def _view(seen: dict[str, Any], rates: Rates | None) -> Group:
    base, engine = seen["base"], seen["engine"]
    kv_used = 1 - engine["kv_blocks_free"] / engine["kv_blocks"]
    lines = [
        f"[bold]{base['name']}[/bold] ({format_bytes(base['bytes'])}) on {base['device']}, "
        f"{seen['adapters_total']} adapters",
        f"{engine['running']} running, {engine['waiting']} waiting, KV cache {percent(kv_used)} in use",
        _training(engine["training"]),
    ]
    if (short := shortage(engine)) is not None:
        lines.append(short)
    if rates is not None:
        lines.append(
            f"{rates.tokens:.0f} tokens/s, {rates.hits:.1f} adapters/s found on the device, {rates.loads:.1f}/s loaded"
        )
    columns = {
        "Used last": "model",
        "Tier": "tier",
        "Size": "size",
        "Hits": "hits",
        "Loads": "loads",
        "Last use": "last_use",
        "Pinned": "pinned",
    }
    used = [
        {**a, "size": size(a["bytes"]), "last_use": ago(a["last_used_at"])}
        for a in seen["adapters"]
        if a["last_used_at"] is not None
    ]
    right = ("Size", "Hits", "Loads", "Last use")
    return Group(*lines, tiers_table(seen["tiers"]), table_of(used, columns, right=right))


def _training(training: dict[str, Any]) -> str:
    """What training gets of the device, and what that costs those who wait for tokens."""
    if not training["runs"] and not training["share"]:
        return "no job is training"
    jobs = f"{training['runs']} job{'' if training['runs'] == 1 else 's'} training"
    line = f"{jobs}: {percent(training['share'])} of the time, {training['tokens_per_second']:.0f} tokens/s"
    if training["p95_ms"] is None:
        return line
    return (
        f"{line}; token latency p95 {training['p95_ms']:.0f} ms, {training['idle_p95_ms']:.0f} ms without "
        f"(allowed: {training['latency_slo']:g} times that)"
    )
