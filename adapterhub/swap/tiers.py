"""Where each version is, and how it gets to the device: pool, host RAM, disk.

`acquire` pins a version for one request and starts its way to the device if it is not there; `poll` completes what the
reading threads have brought; `release` unpins. Nothing here waits for a disk. What goes and what moves is decided by
`Residency`, and done here, between two steps of the engine. All state belongs to the engine's thread; the threads only
fill memory, of the host and of the device, that was set aside for them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from adapterhub.config import format_bytes
from adapterhub.errors import BadRequest, HubError, Unavailable
from adapterhub.swap.disk import DiskTier
from adapterhub.swap.hold import Hold, Resident
from adapterhub.swap.latency import Latencies
from adapterhub.swap.layout import Layout
from adapterhub.swap.loader import Arrival, HostBlock, Loader
from adapterhub.swap.policies import Rules
from adapterhub.swap.pool import Extent, Pool
from adapterhub.swap.ref import AdapterRef, Tier
from adapterhub.swap.residency import Admission, Plan, Residency, item_of

log = logging.getLogger(__name__)
_READ_AHEAD_SHARE = 0.5
_TIERS = (Tier.DEVICE, Tier.RAM, Tier.DISK, Tier.REMOTE)


@dataclass
class Counters:
    """Since the start: how often a version was found in each tier, and what moved."""

    hits: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(_TIERS, 0))
    evictions: int = 0  # from the device, for others, by rules or for another budget
    ram_evictions: int = 0
    loaded_bytes: int = 0  # from below RAM
    moved_bytes: int = 0  # within the pool


class _Budgets(NamedTuple):
    """A change of budgets, from when it is asked for until nothing is on its way to the device; None: as it is."""

    device: int | None
    ram: int | None
    done: Future[None]


class Tiers:
    """`wake` is called from a reading thread when a load has ended, so that the engine comes to `poll`."""

    def __init__(
        self,
        pool: Pool,
        disk: DiskTier,
        fingerprint: str,
        layout: Layout,
        *,
        ram_bytes: int,
        load_threads: int,
        wake: Callable[[], None],
        rules: Rules | None = None,
    ) -> None:
        self.pool = pool
        self.disk = disk
        self.residency = Residency(pool.capacity, ram_bytes, rules)
        self.loader = Loader(pool, disk, fingerprint, layout, load_threads, wake)
        self.counters = Counters()
        self._latencies = {tier: Latencies() for tier in _TIERS[1:]}
        self._residents: dict[str, Resident] = {}
        self._loading: dict[str, Future[Arrival]] = {}
        self._host: dict[str, HostBlock] = {}
        self._changing: _Budgets | None = None

    # -- what requests do

    def acquire(self, ref: AdapterRef) -> Hold | None:
        """Pins `ref`, starting a load if it is not on the device. None when there is no room before others release.

        Raises Unavailable when it could never fit.
        """
        resident = self._residents.get(ref.digest)
        if resident is not None:
            tier = Tier.DEVICE if resident.placed is not None else resident.found
        else:
            self._check_size(ref)
            resident = self._start_load(ref)
            if resident is None:
                return None
            tier = resident.found
        self.counters.hits[tier] += 1
        resident.pins += 1
        self.residency.hold(ref.digest, time.monotonic())
        return Hold(resident, tier)

    def release(self, hold: Hold) -> None:
        resident = hold.resident
        resident.pins -= 1
        if resident.error is not None:  # it has left already
            return
        self.residency.release(resident.digest, time.monotonic())
        loading = resident.digest in self._loading  # a reader still writes into its extent: `poll` evicts it
        if resident.pins == 0 and resident.condemned and not loading:
            self._remove(resident)

    def poll(self) -> None:
        """Takes in the loads that have ended. A failed one leaves its error with the requests that wait for it."""
        for digest in [d for d, future in self._loading.items() if future.done()]:
            self._arrive(self._residents[digest], self._loading.pop(digest))
        if self._changing is not None and not self._loading:
            changing, self._changing = self._changing, None
            try:
                self._change_budgets(changing.device, changing.ram)
                changing.done.set_result(None)
            except Exception as error:
                changing.done.set_exception(error)

    @property
    def readers_idle(self) -> bool:
        """Whether a load could start at once without holding up another."""
        return len(self._loading) < self.loader.threads and self._changing is None

    def prefetch(self, ref: AdapterRef, spare: Collection[str]) -> bool:
        """Starts a load that nobody waits for yet, if there is room without those of `spare`, and without those in use.
        False when there is none.

        A failure is told to the next who asks. Nothing is loaded while more than half of the pool is in use: it would
        have to leave again before it is asked for.
        """
        if ref.digest in self._residents:
            return True
        most = self.residency.allocator.capacity * _READ_AHEAD_SHARE
        fits = self.residency.busy_bytes + ref.nbytes <= most
        return fits and self.readers_idle and self._start_load(ref, spare) is not None

    # -- what operators do

    def evict(self, digest: str, tier: Tier | None = None) -> bool:
        """Takes a block off the device, out of RAM, or both (None). False when it goes once its requests have ended."""
        resident = self._residents.get(digest)
        if tier is not Tier.DEVICE:
            if self._host.pop(digest, None) is not None:
                self.residency.ram.remove(digest)
            if resident is not None:
                resident.keep = False
        if tier is Tier.RAM or resident is None:
            return True
        resident.condemned = True
        if resident.pins or digest in self._loading:
            return False
        self._remove(resident)
        return True

    def pin(self, digest: str, pinned: bool) -> None:
        """What is in memory stays, or may go again; what is loaded later says so itself."""
        self.residency.pin(digest, pinned, time.monotonic())
        if (resident := self._residents.get(digest)) is not None:
            resident.pinned = pinned

    def set_budgets(self, device: int | None, ram: int | None) -> Future[None]:
        """Other budgets, in bytes; None leaves one as it is. What no longer fits goes once nothing is on its way, and
        until then nothing else is loaded. Fails with BadRequest when what is pinned or in use would not fit."""
        self.plan(None, device, ram)
        if self._changing is not None:
            raise BadRequest("The budgets are being changed already. Try again when that is done.")
        done: Future[None] = Future()
        self._changing = _Budgets(device, ram, done)
        self.poll()
        return done

    def set_rules(self, rules: Rules) -> None:
        """What the new rules let go of, goes at once."""
        self._drop(self._possible(self.residency.change(rules, None, None, time.monotonic())))

    def plan(self, rules: Rules | None, device: int | None, ram: int | None) -> Plan:
        """What would go at once. Raises BadRequest when what is pinned or in use would not fit."""
        return self._possible(self.residency.plan(rules, device, ram, time.monotonic()))

    @property
    def has_ttl(self) -> bool:
        """Whether something may have to go although nobody asks for anything."""
        rules = self.residency.rules
        return rules.device.ttl_seconds is not None or rules.ram.ttl_seconds is not None

    def expire(self) -> None:
        """Lets go of what was unused for longer than the rules say."""
        self._drop(self.residency.expire(time.monotonic()))

    def tier_of(self, digest: str) -> Tier:
        resident = self._residents.get(digest)
        if resident is not None and resident.placed is not None:
            return Tier.DEVICE
        return Tier.RAM if digest in self._host else self.disk.tier_of(digest)

    def stats(self) -> dict[str, Any]:
        """By tier; `hit_ratio` is of the lookups that came to it."""
        residency, hits = self.residency, self.counters.hits
        allocator, lookups = residency.allocator, sum(hits.values())
        missed, free = lookups - hits[Tier.DEVICE], allocator.free_bytes
        return {
            "device": {
                "budget_bytes": allocator.capacity,
                "used_bytes": allocator.used_bytes,
                "largest_free_bytes": allocator.largest_free,
                "fragmentation": 1 - allocator.largest_free / free if free else 0.0,
                "adapters": len(residency.device) - len(self._loading),
                "pinned": residency.device.pinned,
                "in_use": sum(1 for r in self._residents.values() if r.pins),
                "hits": hits[Tier.DEVICE],
                "hit_ratio": hits[Tier.DEVICE] / lookups if lookups else None,
                "evictions": self.counters.evictions,
                "loads": sum(latency.count for latency in self._latencies.values()),
                "loaded_bytes": self.counters.loaded_bytes,
                "moved_bytes": self.counters.moved_bytes,
            },
            "ram": {
                "budget_bytes": residency.ram_bytes,
                "used_bytes": residency.ram.used_bytes,
                "adapters": len(residency.ram),
                "pinned": residency.ram.pinned,
                "hits": hits[Tier.RAM],
                "hit_ratio": hits[Tier.RAM] / missed if missed else None,
                "evictions": self.counters.ram_evictions,
                "loads": self._latencies[Tier.RAM].count,
                "load_ms": self._latencies[Tier.RAM].summary(),
            },
            **self.disk.stats(),
        }

    def check_integrity(self, pins: int = 0) -> None:
        """Raises AssertionError unless extents, residents and pins (`pins` in all) agree."""
        self.residency.check_integrity()
        assert set(self.residency.device) == self._residents.keys(), "a block has a place and no resident"
        assert set(self.residency.ram) == self._host.keys(), "RAM holds other blocks than it says"
        assert sum(r.pins for r in self._residents.values()) == pins, "pins leaked"
        for digest, resident in self._residents.items():
            place = self.residency.place(digest)
            assert place.users == resident.pins, "a block is in use by others than hold it"
            assert place.loading == (digest in self._loading), "a block is on its way without a reader"

    def close(self) -> None:
        self.loader.close()
        if self._changing is not None:
            self._changing.done.set_exception(
                Unavailable("The server is shutting down; the budgets stay as they were.")
            )

    # -- how it is done

    def _check_size(self, ref: AdapterRef) -> None:
        capacity = self.residency.allocator.capacity
        if ref.nbytes > capacity:
            raise Unavailable(
                f"This adapter has {format_bytes(ref.nbytes)}; the device pool of this server holds "
                f"{format_bytes(capacity)}. Ask the operator to raise --device-bytes.",
                code="adapter_too_large",
            )

    def _start_load(self, ref: AdapterRef, spare: Collection[str] = ()) -> Resident | None:
        if self._changing is not None:
            return None
        now = time.monotonic()
        item = item_of(ref.digest, ref.nbytes, ref.owner)
        admission = self.residency.admit(item, now, pinned=ref.pinned, spare=spare)
        if admission is None:
            return None
        self._carry_out(admission)
        host = self._host.get(ref.digest)
        if host is not None:
            self.residency.ram.touch(ref.digest, now)
        found = self.disk.tier_of(ref.digest) if host is None else Tier.RAM
        resident = Resident(ref.digest, ref.nbytes, ref.owner, found, pinned=ref.pinned)
        self._residents[ref.digest] = resident
        keep = self.residency.ram_bytes > 0
        self._loading[ref.digest] = self.loader.start(ref, self._extent(resident), host, keep)
        return resident

    def _carry_out(self, admission: Admission) -> None:
        for digest in admission.evicted:
            del self._residents[digest]
        self.counters.evictions += len(admission.evicted)
        for move in admission.moves:
            resident = self._residents[move.key]
            self.pool.move(self.pool.extent(move.source, resident.nbytes), self._extent(resident, move.target))
            self._replace(resident, self._extent(resident, move.target))
            self.counters.moved_bytes += resident.nbytes

    def _extent(self, resident: Resident, start: int | None = None) -> Extent:
        at = self.residency.place(resident.digest).start if start is None else start
        return self.pool.extent(at, resident.nbytes)

    def _replace(self, resident: Resident, extent: Extent) -> None:
        """Its holds find it in its new place."""
        assert resident.placed is not None, "what is on its way stays where it is"
        resident.placed = resident.placed.moved(self.pool.view(extent), extent.start)

    def _arrive(self, resident: Resident, future: Future[Arrival]) -> None:
        try:
            block, placed, resident.load_ms = future.result()
        except Exception as error:  # whatever a reader met is the waiting requests' to hear
            resident.error = error if isinstance(error, HubError) else Unavailable(f"The adapter did not load: {error}")
            for _ in range(resident.pins):
                self.residency.release(resident.digest, time.monotonic())
            self._remove(resident)
            if not resident.pins:
                log.info("adapter %s was read ahead in vain: %s", resident.digest[:12], resident.error)
            return
        self._latencies[resident.found].add(resident.load_ms)
        self.residency.arrived(resident.digest)
        if resident.found is not Tier.RAM:
            self.counters.loaded_bytes += block.meta.nbytes
            if resident.keep:
                self._keep_in_ram(resident, block)
        resident.placed = placed
        if resident.condemned and not resident.pins:
            self._remove(resident)

    def _keep_in_ram(self, resident: Resident, block: HostBlock) -> None:
        item = item_of(resident.digest, block.nbytes, resident.owner)
        evicted = self.residency.keep(item, time.monotonic(), pinned=resident.pinned)
        if evicted is not None:
            self._host[resident.digest] = block
            for digest in evicted:
                del self._host[digest]
            self.counters.ram_evictions += len(evicted)

    def _remove(self, resident: Resident) -> None:
        del self._residents[resident.digest]
        self.residency.remove(resident.digest)
        if resident.digest in self._host:
            self.residency.ram.rest(resident.digest, time.monotonic())

    def _change_budgets(self, device: int | None, ram: int | None) -> None:
        try:
            memory = None if device is None else self.pool.memory(device)
        except torch.OutOfMemoryError as error:
            raise BadRequest(
                f"The device has no {format_bytes(device or 0)} beside the pool that it would replace. Choose less, or "
                "restart the server with the new budget."
            ) from error
        sources = {digest: self._extent(resident) for digest, resident in self._residents.items()}
        self._drop(self._possible(self.residency.change(None, device, ram, time.monotonic())))
        if memory is not None:
            targets = {digest: self._extent(resident) for digest, resident in self._residents.items()}
            self.pool.adopt(memory, [(sources[digest], extent) for digest, extent in targets.items()])
            for digest, extent in targets.items():
                self._replace(self._residents[digest], extent)

    def _possible(self, plan: Plan | None) -> Plan:
        if plan is None:
            places = [self.residency.place(d) for d in self._residents]
            busy = sum(p.size for d, p in zip(self._residents, places, strict=True) if p.busy or self._is_pinned(d))
            raise BadRequest(
                f"What is pinned or in use would not fit: {format_bytes(busy)} on the device, "
                f"{format_bytes(self.residency.ram.pinned_bytes)} in RAM. Choose more, or unpin some of it."
            )
        return plan

    def _is_pinned(self, digest: str) -> bool:
        return self.residency.device.is_pinned(digest)

    def _drop(self, plan: Plan) -> None:
        """Forgets what the residency has let go of."""
        for digest, _ in plan.device:
            del self._residents[digest]
        for digest, _ in plan.ram:
            del self._host[digest]
        self.counters.evictions += len(plan.device)
        self.counters.ram_evictions += len(plan.ram)
