"""What operators see of the tiers in memory: where versions were found, what was loaded from where, and how fast."""

from __future__ import annotations

from typing import Any

from adapterhub.swap.contents import Contents
from adapterhub.swap.latency import Latencies
from adapterhub.swap.ref import Tier

_TIERS = (Tier.DEVICE, Tier.RAM, Tier.DISK, Tier.REMOTE)


class Counters:
    """Since the start."""

    def __init__(self) -> None:
        self.hits = dict.fromkeys(_TIERS, 0)  # how often a version was found there
        self.loaded_bytes = 0  # from below RAM
        self._latencies = {tier: Latencies() for tier in _TIERS[1:]}

    def loaded(self, found: Tier, nbytes: int, milliseconds: float) -> None:
        """A block has come to the device."""
        self._latencies[found].add(milliseconds)
        self.loaded_bytes += 0 if found is Tier.RAM else nbytes

    def stats(self, contents: Contents, loading: int) -> dict[str, Any]:
        """Of device and RAM, `loading` blocks being on their way; `hit_ratio` is of the lookups that came to a tier.
        The device's `load_ms` are by where a block came from, from when it was asked for until it was there."""
        residency, hits = contents.residency, self.hits
        allocator, lookups = residency.allocator, sum(hits.values())
        missed, free = lookups - hits[Tier.DEVICE], allocator.free_bytes
        return {
            "device": {
                "budget_bytes": allocator.capacity,
                "used_bytes": allocator.used_bytes,
                "largest_free_bytes": allocator.largest_free,
                "fragmentation": 1 - allocator.largest_free / free if free else 0.0,
                "adapters": len(residency.device) - loading,
                "pinned": residency.device.pinned,
                "in_use": sum(1 for resident in contents.residents.values() if resident.pins),
                "lookups": lookups,
                "hits": hits[Tier.DEVICE],
                "hit_ratio": hits[Tier.DEVICE] / lookups if lookups else None,
                "evictions": contents.evictions,
                "loads": sum(latency.count for latency in self._latencies.values()),
                "load_ms": {tier.value: latency.summary() for tier, latency in self._latencies.items()},
                "loaded_bytes": self.loaded_bytes,
                "moved_bytes": contents.moved_bytes,
            },
            "ram": {
                "budget_bytes": residency.arena.allocator.capacity,
                "used_bytes": residency.ram.used_bytes,
                "adapters": len(contents.host),
                "pinned": residency.ram.pinned,
                "lookups": missed,
                "hits": hits[Tier.RAM],
                "hit_ratio": hits[Tier.RAM] / missed if missed else None,
                "evictions": contents.host.evictions,
                "loads": self._latencies[Tier.RAM].count,
                "load_ms": self._latencies[Tier.RAM].summary(),
            },
        }
