"""What several engines say of themselves, as one: sums where that means something."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Stats = Mapping[str, Any]


def totals(parts: Sequence[Stats]) -> dict[str, Any]:
    """Of what `Engine.stats` says, of one engine or more. The disk and the store are the same for all of them."""
    if len(parts) == 1:
        return dict(parts[0])
    first = parts[0]
    tiers = [part["tiers"] for part in parts]
    engines = [part["engine"] for part in parts]
    engine = {name: sum(e[name] for e in engines) for name in first["engine"] if name != "training"}
    return {
        "tiers": {**first["tiers"], "device": _device([t["device"] for t in tiers]), "ram": _ram(tiers)},
        "engine": {**engine, "training": _training([e["training"] for e in engines])},
    }


def _device(parts: Sequence[Stats]) -> dict[str, Any]:
    total = _tier(parts)
    free = total["budget_bytes"] - total["used_bytes"]
    in_one_piece = sum(part["largest_free_bytes"] for part in parts)
    total["largest_free_bytes"] = max(part["largest_free_bytes"] for part in parts)
    total["fragmentation"] = 1 - in_one_piece / free if free else 0.0
    times = [part["load_ms"] for part in parts]
    total["load_ms"] = {source: _slowest([time[source] for time in times]) for source in times[0]}
    return total


def _ram(tiers: Sequence[Stats]) -> dict[str, Any]:
    parts = [tier["ram"] for tier in tiers]
    return {**_tier(parts), "load_ms": _slowest([part["load_ms"] for part in parts])}


def _slowest(times: Sequence[Mapping[str, float] | None]) -> dict[str, float] | None:
    """Of each percentile the longest; None where nothing was loaded."""
    known = [time for time in times if time is not None]
    return {name: max(time[name] for time in known) for name in known[0]} if known else None


def _training(parts: Sequence[Stats]) -> dict[str, Any]:
    """Of the latencies, those of the device on which they are longest; of the share, the mean."""
    summed = ("runs", "tokens", "out_of_memory", "tokens_per_second")
    sums = {name: sum(part[name] for part in parts) for name in summed}
    slowest = max(parts, key=lambda part: part["p95_ms"] or 0.0)
    return {**slowest, **sums, "share": round(sum(part["share"] for part in parts) / len(parts), 3)}


def _tier(parts: Sequence[Stats]) -> dict[str, Any]:
    """The sum of each number; ratios are made anew."""
    ratios = ("hit_ratio", "fragmentation", "load_ms")
    total: dict[str, Any] = {n: None if n in ratios else sum(part[n] for part in parts) for n in parts[0]}
    total["hit_ratio"] = total["hits"] / total["lookups"] if total["lookups"] else None
    return total
