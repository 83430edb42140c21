"""Where each version is, and how it gets to the device: pool, host RAM, disk, store.

`acquire` pins a version for one request and starts its way to the device if it is not there; `poll` completes what the
threads have brought; `release` unpins. Nothing here waits for a disk or a store. All state belongs to the engine's
thread; the reading threads only fill memory that was set aside for them (`Contents`).

What only the store has is brought to the disk first, and takes its place in the pool then: a store that hangs holds up
those who wait for it, and nothing else.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from adapterhub.config import format_bytes
from adapterhub.errors import BadRequest, HubError, Unavailable
from adapterhub.swap.contents import Contents
from adapterhub.swap.copies import Copies, copies_to
from adapterhub.swap.counters import Counters
from adapterhub.swap.disk import DiskTier, Elsewhere
from adapterhub.swap.hold import Hold, Resident
from adapterhub.swap.layout import Layout
from adapterhub.swap.loader import Loader
from adapterhub.swap.loads import Load, Loads
from adapterhub.swap.policies import Rules
from adapterhub.swap.pool import Pool
from adapterhub.swap.ref import AdapterRef, Tier
from adapterhub.swap.residency import Plan, item_of
from adapterhub.swap.resize import give_back, set_budgets

log = logging.getLogger(__name__)
_READ_AHEAD_SHARE = 0.5
_PINS = 4096  # changes of pins that are remembered: no request waits while more are made
_FETCHES = (
    2  # after so many the file is read where it is fetched: others push it off the disk at once, or it is damaged
)


class _Fetch(NamedTuple):
    """A block that comes from the store to the disk, or has come and waits for a place in the pool."""

    resident: Resident
    future: Future[None]
    spare: Collection[str] | None  # it is read ahead, if there is room without those; None: somebody asked for it


class _Budgets(NamedTuple):
    """A change of budgets, from when it is asked for until nothing is on its way to the device; None: as it is."""

    device: int | None
    ram: int | None
    done: Future[None]


class Tiers:
    """`wake` is called from a thread when a load has ended, so that the engine comes to `poll`."""

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
        copies: Copies | None = None,
    ) -> None:
        """`copies` are those of another device than the pool's, for tests."""
        copies = copies or copies_to(pool.device)
        self.pool = pool
        self.disk = disk
        self.contents = Contents(pool, ram_bytes, rules, copies)
        self.loader = Loader(pool, disk, copies, fingerprint, layout, load_threads, wake)
        self.counters = Counters()
        self._loading = Loads(self.contents, self.loader, copies, self.counters)
        self._fetching: dict[str, _Fetch] = {}
        self._crowding: Resident | None = None  # it came from the store, and waits for a place before all others
        self._pins: dict[str, bool] = {}  # what was last said of a block: a request may be older
        self._changing: _Budgets | None = None

    # -- what requests do

    def acquire(self, ref: AdapterRef) -> Hold | None:
        """Pins `ref`, starting a load if it is not on the device. None when there is no room before others release.

        Raises Unavailable when it could not fit, whoever releases.
        """
        resident = self._known(ref.digest)
        if resident is None:
            self._check_size(ref)
            resident = self._begin(ref)
            if resident is None:
                return None
        tier = Tier.DEVICE if resident.placed is not None else resident.found
        self.counters.hits[tier] += 1
        resident.pins += 1
        if not resident.away:
            self.contents.residency.hold(ref.digest, time.monotonic())
        return Hold(resident, tier)

    def release(self, hold: Hold) -> None:
        resident = hold.resident
        resident.pins -= 1
        if resident.error is not None or resident.away:  # it has left already, or has no place yet
            return
        self.contents.residency.release(resident.digest, time.monotonic())
        loading = resident.digest in self._loading  # a reader still writes into its extent: `poll` evicts it
        if resident.pins == 0 and resident.condemned and not loading:
            self.contents.remove(resident)

    def would_fit(self, ref: AdapterRef, without: Sequence[Hold]) -> bool:
        """Whether what is not on the device would find room there without these holds."""
        given = Counter(hold.resident.digest for hold in without)
        released = {h.resident.digest for h in without if given[h.resident.digest] == h.resident.pins}
        first = self._crowding
        if self._changing is not None or (first is not None and first.digest not in {ref.digest, *released}):
            return False
        return self.contents.residency.fits(item_of(ref.digest, ref.nbytes, ref.owner), released)

    def poll(self, *, idle: bool = False) -> None:
        """Takes in what the threads have brought. A load that failed leaves its error with the requests that wait.

        `idle` says that nothing else would run meanwhile: then a step may wait for a block on the device.
        """
        for load in self._loading.ended(idle=idle):
            self._arrive(load)
        if self._changing is not None and not self._loading:
            changing, self._changing = self._changing, None
            self._loading.await_copies()
            try:
                set_budgets(self.contents, changing.device, changing.ram)
                changing.done.set_result(None)
            except Exception as error:
                changing.done.set_exception(error)
        self._crowding = self._take_places()

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
        if self._known(ref.digest) is not None:
            return True
        if self._where(ref.digest) is Tier.REMOTE:
            if len(self._fetching) < self.loader.FETCH_THREADS:
                self._fetch(self._resident(ref), spare)
            return True
        return self._fits_ahead(ref) and self.readers_idle and self._begin(ref, spare) is not None

    def has_place(self, digest: str) -> bool:
        """Whether it is on the device, or on its way to a place there: who asks for it takes no room."""
        return digest in self.contents.residents

    def would_fit_beside(self, ref: AdapterRef, beside: Collection[str]) -> bool:
        """Whether there will be room for a block once none is in use but those of `beside`, by their digests."""
        return self.contents.residency.fits_beside(ref.nbytes, beside)

    # -- what operators do

    def evict(self, digest: str, tier: Tier | None = None) -> bool:
        """Takes a block off the device, out of RAM, or both (None). False when it goes once its requests have ended."""
        resident = self._known(digest)
        if tier is not Tier.DEVICE:
            self.contents.host.remove(digest)
            if resident is not None:
                resident.keep = False
        if tier is Tier.RAM or resident is None:
            return True
        resident.condemned = True
        if resident.pins or resident.away or digest in self._loading:
            return False
        self.contents.remove(resident)
        return True

    def pin(self, digest: str, pinned: bool) -> None:
        """What is in memory, or comes there later, stays, or may go again."""
        self._pins.pop(digest, None)
        self._pins[digest] = pinned
        if len(self._pins) > _PINS:
            del self._pins[next(iter(self._pins))]
        self.contents.residency.pin(digest, pinned, time.monotonic())
        if (resident := self._known(digest)) is not None:
            resident.pinned = pinned

    def set_budgets(self, device: int | None, ram: int | None) -> Future[None]:
        """Other budgets, in bytes; None leaves one as it is. What no longer fits goes once nothing is on its way, and
        until then nothing else is loaded. Fails with BadRequest when what is pinned or in use would not fit, or there
        is not so much memory."""
        self.plan(None, device, ram)
        if self._changing is not None:
            raise BadRequest("The budgets are being changed already. Try again when that is done.")
        done: Future[None] = Future()
        self._changing = _Budgets(device, ram, done)
        self.poll()
        return done

    def give_back(self, nbytes: int) -> int:
        """Makes the device pool smaller by `nbytes`, or by what can be given without what is in use or pinned, and
        without two pools at once; how many bytes that were. 0 also while loads are on their way: try again later.

        Raises torch.OutOfMemoryError when the pool is lost (`resize.give_back`).
        """
        if self._loading or self._changing is not None:
            return 0
        self._loading.await_copies()
        return give_back(self.contents, nbytes)

    def set_rules(self, rules: Rules) -> None:
        """What the new rules let go of, goes at once."""
        self.contents.set_rules(rules)

    def plan(self, rules: Rules | None, device: int | None, ram: int | None) -> Plan:
        """What would go at once. Raises BadRequest when what is pinned or in use would not fit."""
        return self.contents.plan(rules, device, ram)

    @property
    def has_ttl(self) -> bool:
        """Whether something may have to go although nobody asks for anything."""
        rules = self.contents.residency.rules
        return rules.device.ttl_seconds is not None or rules.ram.ttl_seconds is not None

    def expire(self) -> None:
        """Lets go of what was unused for longer than the rules say."""
        self.contents.drop(self.contents.residency.expire(time.monotonic()))

    def tier_of(self, digest: str) -> Tier:
        resident = self.contents.residents.get(digest)
        return Tier.DEVICE if resident is not None and resident.placed is not None else self._where(digest)

    def nearest(self, digest: str) -> Tier | None:
        """DEVICE also for what is on its way there; None for what is not in memory. Look-ups alone, for any thread."""
        if self._known(digest) is not None:
            return Tier.DEVICE
        return Tier.RAM if digest in self.contents.host else None

    def stats(self) -> dict[str, Any]:
        """By tier; `hit_ratio` is of the lookups that came to it."""
        return {**self.counters.stats(self.contents, len(self._loading)), **self.disk.stats()}

    def check_integrity(self, pins: int = 0) -> None:
        """Raises AssertionError unless extents, residents and pins (`pins` in all) agree."""
        self.contents.check_integrity(self._loading.berths)
        residents = self.contents.residents
        away = [fetch.resident for fetch in self._fetching.values()]
        assert residents.keys().isdisjoint(self._fetching), "a block is here and on its way from the store"
        assert all(r.away for r in away), "a block comes from the store and does not say so"
        assert not any(r.away for r in residents.values()), "a block has a place and says that it has none"
        assert sum(r.pins for r in (*residents.values(), *away)) == pins, "pins leaked"
        for digest in residents:
            loading = self.contents.residency.place(digest).loading
            assert loading == (digest in self._loading), "a block is on its way without a reader"

    def close(self) -> None:
        self._loading.close()
        self.contents.host.close()
        if self._changing is not None:
            self._changing.done.set_exception(
                Unavailable("The server is shutting down; the budgets stay as they were.")
            )

    # -- how it is done

    def _known(self, digest: str) -> Resident | None:
        """What is on the device, or on its way."""
        if (fetch := self._fetching.get(digest)) is not None:
            return fetch.resident
        return self.contents.residents.get(digest)

    def _where(self, digest: str) -> Tier:
        """Of what is not on the device."""
        return Tier.RAM if digest in self.contents.host else self.disk.tier_of(digest)

    def _resident(self, ref: AdapterRef) -> Resident:
        pinned = self._pins.get(ref.digest, ref.pinned)
        return Resident(ref, self._where(ref.digest), time.perf_counter(), pinned=pinned)

    def _check_size(self, ref: AdapterRef) -> None:
        capacity = self.contents.residency.allocator.capacity
        if ref.nbytes > capacity:
            raise Unavailable(
                f"This adapter has {format_bytes(ref.nbytes)}; the device pool of this server holds "
                f"{format_bytes(capacity)}. Ask the operator to raise --device-bytes.",
                code="adapter_too_large",
            )
        if ref.nbytes > capacity - self.contents.residency.device.pinned_bytes:
            raise Unavailable(
                f"This adapter has {format_bytes(ref.nbytes)}, for which the device pool of this server has no room "
                "beside what is pinned there. Ask the operator to unpin some of it, or to raise --device-bytes.",
                code="adapter_too_large",
            )

    def _fits_ahead(self, ref: AdapterRef) -> bool:
        most = self.contents.residency.allocator.capacity * _READ_AHEAD_SHARE
        return self.contents.residency.pool.busy_bytes + ref.nbytes <= most

    def _begin(self, ref: AdapterRef, spare: Collection[str] = ()) -> Resident | None:
        """Sends for what is not on the device. None when it finds no room there."""
        resident = self._resident(ref)
        if resident.found is Tier.REMOTE:
            self._fetch(resident, None)
        elif self._crowding or not self._load(resident, spare):  # who came first takes their place first
            return None
        return resident

    def _load(self, resident: Resident, spare: Collection[str]) -> bool:
        """Takes a place in the pool and starts the read. False when there is no room."""
        if self._changing is not None or not self.contents.admit(resident, spare):
            return False
        for _ in range(resident.pins):
            self.contents.residency.hold(resident.digest, time.monotonic())
        self._loading.start(resident, fetches=resident.fetches >= _FETCHES)
        return True

    def _arrive(self, load: Load) -> None:
        resident = load.resident
        try:
            arrival = self._loading.take_in(load)
        except Exception as error:  # whatever a reader met
            for _ in range(resident.pins):
                self.contents.residency.release(resident.digest, time.monotonic())
            self.contents.remove(resident)
            if isinstance(error, Elsewhere) and resident.pins:
                self._fetch(resident, None)
            else:
                self._fail(resident, error)
            return
        self.contents.arrived(resident, arrival.placed)
        if resident.condemned and not resident.pins:
            self.contents.remove(resident)

    def _fetch(self, resident: Resident, spare: Collection[str] | None) -> None:
        resident.away, resident.landed = True, False
        resident.fetches += 1
        self._fetching[resident.digest] = _Fetch(resident, self.loader.fetch(resident.ref), spare)

    def _take_places(self) -> Resident | None:
        """What has come from the store goes on to the pool, in the order in which it was asked for; what nobody waits
        for any more stays on the disk. Returns the first for which there is no room."""
        crowding = None
        for digest, (resident, future, spare) in list(self._fetching.items()):
            if not future.done():
                continue
            try:
                future.result()
                self._check_size(resident.ref)  # the pool may be smaller by now
            except Exception as error:
                del self._fetching[digest]
                self._fail(resident, error)
                continue
            ahead = not resident.pins
            if ahead and (spare is None or not self._fits_ahead(resident.ref)):
                del self._fetching[digest]
                continue
            resident.landed = True
            if crowding is not None:
                continue
            resident.away = False
            if self._load(resident, spare if ahead and spare else ()) or ahead:
                del self._fetching[digest]
            else:
                resident.away, crowding = True, resident
        return crowding

    def _fail(self, resident: Resident, error: Exception) -> None:
        """The error is the waiting requests' to hear."""
        resident.away = False
        resident.error = error if isinstance(error, HubError) else Unavailable(f"The adapter did not load: {error}")
        if not resident.pins:
            log.info("adapter %s was read ahead in vain: %s", resident.digest[:12], resident.error)
