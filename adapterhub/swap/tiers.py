"""Where each version is, and how it gets to the device: pool, host RAM, disk.

`acquire` pins a version for one request and starts its way to the device if it is not there; `poll` completes what the
reading threads have brought; `release` unpins. Nothing here waits for a disk. All state belongs to the engine's thread;
the threads only fill memory, of the host and of the device, that was set aside for them.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch

from adapterhub.config import format_bytes
from adapterhub.errors import HubError, Unavailable
from adapterhub.swap.allocator import aligned
from adapterhub.swap.block import BlockMeta
from adapterhub.swap.disk import DiskTier
from adapterhub.swap.layout import Factors, Layout
from adapterhub.swap.policy import Span, plan_room, plan_shrink
from adapterhub.swap.pool import Extent, Pool
from adapterhub.swap.ref import AdapterRef, Tier

_TIERS = (Tier.DEVICE, Tier.RAM, Tier.DISK, Tier.REMOTE)


@dataclass
class Resident:
    """A block in the pool, or on its way there: `placed` is None until it has arrived."""

    digest: str
    extent: Extent
    found: Tier
    placed: Placed | None = None
    error: HubError | None = None
    pins: int = 0
    last_use: float = 0.0
    load_ms: float = 0.0
    condemned: bool = False  # evict as soon as nobody uses it


@dataclass
class Hold:
    """One request's pin on one version, and where the version was found."""

    resident: Resident
    tier: Tier

    @property
    def ready(self) -> bool:
        return self.resident.placed is not None

    @property
    def factors(self) -> dict[str, Factors]:
        """Target name -> views of its A and B in the pool; valid until the hold is released, like `offsets`."""
        return self._placed.factors

    @property
    def offsets(self) -> torch.Tensor:
        """[number of the base's targets] where each target's A lies in the pool, in elements; -1 for one it lacks."""
        return self._placed.offsets

    @property
    def rank(self) -> int:
        return self._placed.rank

    @property
    def _placed(self) -> Placed:
        assert self.resident.placed is not None, "the adapter has not arrived"
        return self.resident.placed

    @property
    def error(self) -> HubError | None:
        return self.resident.error

    @property
    def load_ms(self) -> float:
        return 0.0 if self.tier is Tier.DEVICE else self.resident.load_ms


class HostBlock(NamedTuple):
    meta: BlockMeta
    payload: torch.Tensor

    @property
    def nbytes(self) -> int:
        """What it takes of RAM: torch rounds the pinned memory that a GPU is reached from up to a power of two."""
        size = self.meta.nbytes
        return 1 << (size - 1).bit_length() if self.payload.is_pinned() else size


class Placed:
    """Where a block's factors lie in the pool, for kernels as offsets and for torch as views, made when first asked."""

    def __init__(self, meta: BlockMeta, block: torch.Tensor, start: int, base: Layout) -> None:
        """`block` is the block's view of the pool, at element `start`; `base` has all targets, in order."""
        self.rank = meta.rank
        self._layout, self._block = meta.layout, block
        at = meta.layout.offsets
        offsets = [start + meta.rank * at[t.name] if t.name in at else -1 for t in base.targets]
        self.offsets = torch.tensor(offsets, dtype=torch.int64)

    @cached_property
    def factors(self) -> dict[str, Factors]:
        return {target.name: factors for target, factors in self._layout.all_factors(self._block, self.rank)}


class Arrival(NamedTuple):
    """What a reading thread brings: the block in host memory, and where it lies, or will lie, in the pool."""

    block: HostBlock
    placed: Placed


@dataclass
class Counters:
    """Since the start: how often a version was found in each tier, and what moved."""

    hits: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(_TIERS, 0))
    evictions: int = 0
    loaded_bytes: int = 0


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
    ) -> None:
        self.pool = pool
        self.disk = disk
        self.fingerprint = fingerprint
        self._layout = layout
        self.ram_bytes = ram_bytes
        self.counters = Counters()
        self._wake = wake
        self._residents: dict[str, Resident] = {}
        self._loading: dict[str, Future[Arrival]] = {}
        self._host: OrderedDict[str, HostBlock] = OrderedDict()  # least recently used first
        self._readers = ThreadPoolExecutor(load_threads, thread_name_prefix="adapterhub-read")

    # -- what requests do

    def acquire(self, ref: AdapterRef) -> Hold | None:
        """Pins `ref`, starting a load if it is not on the device. None when there is no room before others release.

        Raises Unavailable when it could never fit.
        """
        resident = self._residents.get(ref.digest)
        if resident is not None:
            tier = Tier.DEVICE if resident.placed is not None else resident.found
        else:
            resident = self._start_load(ref)
            if resident is None:
                return None
            tier = resident.found
        self.counters.hits[tier] += 1
        resident.pins += 1
        resident.last_use = time.monotonic()
        return Hold(resident, tier)

    def release(self, hold: Hold) -> None:
        resident = hold.resident
        resident.pins -= 1
        resident.last_use = time.monotonic()
        loading = resident.digest in self._loading  # a reader still writes into its extent: `poll` evicts it
        if resident.pins == 0 and resident.condemned and resident.error is None and not loading:
            self._evict(resident)

    def poll(self) -> None:
        """Takes in the loads that have ended. A failed one leaves its error with the requests that wait for it."""
        for digest in [d for d, future in self._loading.items() if future.done()]:
            self._arrive(self._residents[digest], self._loading.pop(digest))

    # -- what operators do

    def evict(self, digest: str) -> bool:
        """Takes a block off the device and out of RAM. False when requests still use it: it goes when they end."""
        self._host.pop(digest, None)
        resident = self._residents.get(digest)
        if resident is None:
            return True
        resident.condemned = True
        if resident.pins or digest in self._loading:
            return False
        self._evict(resident)
        return True

    def tier_of(self, digest: str) -> Tier:
        resident = self._residents.get(digest)
        if resident is not None and resident.placed is not None:
            return Tier.DEVICE
        return Tier.RAM if digest in self._host else self.disk.tier_of(digest)

    def stats(self) -> dict[str, Any]:
        on_device = [r for r in self._residents.values() if r.placed is not None]
        return {
            "device": {
                "budget_bytes": self.pool.allocator.capacity,
                "used_bytes": self.pool.allocator.used_bytes,
                "largest_free_bytes": self.pool.allocator.largest_free,
                "adapters": len(on_device),
                "pinned": sum(1 for r in on_device if r.pins),
                "hits": self.counters.hits[Tier.DEVICE],
                "evictions": self.counters.evictions,
            },
            "ram": {
                "budget_bytes": self.ram_bytes,
                "used_bytes": self._host_bytes(),
                "adapters": len(self._host),
                "hits": self.counters.hits[Tier.RAM],
            },
            "disk": {"loads": self.counters.hits[Tier.DISK], "loaded_bytes": self.counters.loaded_bytes},
        }

    def check_integrity(self, pins: int = 0) -> None:
        """Raises AssertionError unless extents, residents and pins (`pins` in all) agree."""
        self.pool.allocator.check_integrity()
        size = self.pool.dtype.itemsize
        held = sum(aligned(r.extent.numel * size) for r in self._residents.values())
        assert held == self.pool.allocator.used_bytes, "an extent has no resident, or a resident no extent"
        assert sum(r.pins for r in self._residents.values()) == pins, "pins leaked"
        assert self._host_bytes() <= self.ram_bytes, "the host tier is over its budget"

    def close(self) -> None:
        self._readers.shutdown(wait=True, cancel_futures=True)

    # -- how it is done

    def _start_load(self, ref: AdapterRef) -> Resident | None:
        if ref.nbytes > self.pool.allocator.capacity:
            raise Unavailable(
                f"This adapter has {format_bytes(ref.nbytes)}; the device pool of this server holds "
                f"{format_bytes(self.pool.allocator.capacity)}. Ask the operator to raise --device-bytes.",
                code="adapter_too_large",
            )
        extent = self._make_room(ref.nbytes)
        if extent is None:
            return None
        host = self._host.get(ref.digest)
        resident = Resident(ref.digest, extent, self.disk.tier_of(ref.digest) if host is None else Tier.RAM)
        self._residents[ref.digest] = resident
        started = time.perf_counter()

        def load() -> Arrival:
            try:
                return self._load(ref, extent, host)
            finally:
                resident.load_ms = (time.perf_counter() - started) * 1e3

        future = self._readers.submit(load)
        self._loading[ref.digest] = future
        future.add_done_callback(lambda _: self._wake())
        return resident

    def _make_room(self, nbytes: int) -> Extent | None:
        numel = nbytes // self.pool.dtype.itemsize
        extent = self.pool.allocate(numel)
        if extent is not None:
            return extent
        victims = plan_room(self._spans(), aligned(nbytes))
        if victims is None:
            return None
        for digest in victims:
            self._evict(self._residents[digest])
            self.counters.evictions += 1
        return self.pool.allocate(numel)

    def _spans(self) -> list[Span]:
        size = self.pool.dtype.itemsize
        spans = [Span(start, length) for start, length in self.pool.allocator.free_extents]
        for r in self._residents.values():
            busy = r.pins > 0 or r.digest in self._loading
            spans.append(Span(r.extent.start * size, aligned(r.extent.numel * size), r.digest, r.last_use, busy))
        return sorted(spans)

    def _evict(self, resident: Resident) -> None:
        del self._residents[resident.digest]
        self.pool.release(resident.extent)
        if resident.digest in self._host:
            self._host.move_to_end(resident.digest)

    def _load(self, ref: AdapterRef, extent: Extent, host: HostBlock | None) -> Arrival:
        """In a reading thread: the payload goes from its file into its extent, by way of RAM where there is such a
        tier, or a GPU, which is reached from pinned memory."""
        on_cpu = self.pool.device.type == "cpu"
        if host is None:
            if on_cpu and self.ram_bytes == 0:
                payload = self.pool.view(extent)
            else:
                payload = torch.empty(extent.numel, dtype=self.pool.dtype, pin_memory=not on_cpu)
            host = HostBlock(self.disk.read(ref, payload, self.fingerprint), payload)
        if host.payload.data_ptr() != self.pool.view(extent).data_ptr():
            self.pool.copy_in(extent, host.payload)
        return Arrival(host, Placed(host.meta, self.pool.view(extent), extent.start, self._layout))

    def _arrive(self, resident: Resident, future: Future[Arrival]) -> None:
        try:
            block, placed = future.result()
        except Exception as error:  # whatever a reader met is the waiting requests' to hear
            resident.error = error if isinstance(error, HubError) else Unavailable(f"The adapter did not load: {error}")
            self._evict(resident)
            return
        if resident.found is not Tier.RAM:
            self.counters.loaded_bytes += block.meta.nbytes
            if self.ram_bytes > 0 and not resident.condemned:
                self._keep_in_ram(resident.digest, block)
        resident.placed = placed
        if resident.condemned and not resident.pins:
            self._evict(resident)

    def _keep_in_ram(self, digest: str, block: HostBlock) -> None:
        if block.nbytes > self.ram_bytes:
            return
        self._host[digest] = block
        sizes = [(key, entry.nbytes) for key, entry in self._host.items()]
        for key in plan_shrink(sizes, self._host_bytes() - self.ram_bytes):
            del self._host[key]

    def _host_bytes(self) -> int:
        return sum(entry.nbytes for entry in self._host.values())
