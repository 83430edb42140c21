"""The loads that are under way: a block is read into host memory, or straight into the pool, and where a device copies
by itself, it is there once its copy has ended.

A place that a copy reads from or writes to is nobody else's until then. Only the engine's thread may call this.
"""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from adapterhub.swap.contents import Contents
from adapterhub.swap.copies import Copies
from adapterhub.swap.counters import Counters
from adapterhub.swap.hold import Resident
from adapterhub.swap.host import Berth
from adapterhub.swap.loader import Arrival, Errand, Loader


@dataclass
class Load:
    """A block on its way into its place in the pool."""

    resident: Resident
    berth: Berth
    future: Future[Arrival]
    copying: bool = False  # it is as far as that, and the engine will be woken when that has ended

    @property
    def arrival(self) -> Arrival | None:
        """What it brings, unless it is not as far, or has failed."""
        future = self.future
        failed = not future.done() or future.cancelled() or future.exception() is not None
        return None if failed else future.result()


class _Promised(NamedTuple):
    """A block that the device will find in its place, whose berth is in use until its copy has ended."""

    resident: Resident
    berth: Berth
    arrival: Arrival


class Loads:
    """Their number is of those that have not been taken in. They are counted in `counters` once they have ended."""

    def __init__(self, contents: Contents, loader: Loader, copies: Copies, counters: Counters) -> None:
        self._contents, self._loader, self._copies, self._counters = contents, loader, copies, counters
        self._loads: dict[str, Load] = {}
        self._promised: list[_Promised] = []

    def __len__(self) -> int:
        return len(self._loads)

    def __contains__(self, digest: str) -> bool:
        return digest in self._loads

    @property
    def berths(self) -> int:
        """How many may be in use."""
        return len(self._loads) + len(self._promised)

    def start(self, resident: Resident, *, fetches: bool) -> None:
        """Brings a block that has its place in the pool there, from the store, too, if it `fetches`."""
        host = self._contents.host
        berth = host.lend(resident)
        errand = Errand(
            resident.ref,
            self._contents.extent(resident),
            berth,
            resident.asked,
            after=self._copies.mark(),  # kernels and moves that still use what lay there
            fetches=fetches,
            at_once=berth.meta is not None and self._copies.queues and host.is_locked,
        )
        self._loads[resident.digest] = Load(resident, berth, self._loader.start(errand))

    def ended(self, *, idle: bool) -> list[Load]:
        """Those that have arrived, or failed; each is told once, and then to be taken in.

        Where nothing else would run meanwhile (`idle`), the next block that somebody waits for counts as there while it
        is still being copied: the device then waits for it, once it has all that it is to do.
        """
        self._end_copies()
        ended = [load for load in self._loads.values() if self._has_ended(load)]
        if idle and not ended:
            wanted = (load for load in self._loads.values() if load.copying and load.resident.pins)
            ended = [load for load in [next(wanted, None)] if load is not None]
        for load in ended:
            del self._loads[load.resident.digest]
        return ended

    def take_in(self, load: Load) -> Arrival:
        """What it has brought, which the device finds from now on. Raises what a thread met."""
        try:
            arrival = load.future.result()
        except Exception:
            self._contents.host.take_back(load.resident.digest, load.berth)
            raise
        arrival.copy.join()
        load.resident.loaded = arrival.loaded
        self._contents.host.has_read(load.resident, load.berth, arrival.meta)
        self._promised.append(_Promised(load.resident, load.berth, arrival))
        self._end_copies()
        return arrival

    def await_copies(self) -> None:
        """Those of what was taken in. Each takes as long as its bytes take."""
        for promised in self._promised:
            promised.arrival.copy.wait()
        self._end_copies()

    def close(self) -> None:
        """Nothing is copied any more when this returns."""
        self._loader.close()
        with suppress(RuntimeError):  # the device is lost
            for load in self._loads.values():
                if load.arrival is not None:
                    load.arrival.copy.wait()
            self.await_copies()

    def _has_ended(self, load: Load) -> bool:
        if not load.future.done():
            return False
        if (arrival := load.arrival) is None or arrival.copy.done():
            return True
        if not load.copying:
            load.copying = True
            self._loader.await_copy(arrival.copy)
        return False

    def _end_copies(self) -> None:
        for promised in [promised for promised in self._promised if promised.arrival.copy.done()]:
            self._promised.remove(promised)
            resident, berth, arrival = promised
            self._contents.host.take_back(resident.digest, berth)
            self._counters.loaded(resident.found, arrival.meta.nbytes, arrival.loaded.ms)
