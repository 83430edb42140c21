"""The reading threads: they bring blocks from RAM or from the disk into extents that were set aside for them, and from
the store to the disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple, TypeVar

import torch

from adapterhub.swap.block import BlockMeta
from adapterhub.swap.copies import Copies, Copy, Ended, Loaded
from adapterhub.swap.disk import DiskTier
from adapterhub.swap.hold import Placed
from adapterhub.swap.host import Berth
from adapterhub.swap.layout import Layout
from adapterhub.swap.pool import Extent, Pool
from adapterhub.swap.ref import AdapterRef
from adapterhub.swap.threads import Threads, settle

GRACE_SECONDS = 5.0  # for reads that are under way when the server stops
T = TypeVar("T")


class Arrival(NamedTuple):
    """What a load brings: what the block is, and where it lies in the pool as soon as its copy has ended."""

    meta: BlockMeta
    placed: Placed
    loaded: Loaded
    source: torch.Tensor  # what is copied, which stays until then

    @property
    def copy(self) -> Copy:
        return self.loaded.copy


class Errand(NamedTuple):
    """How a block gets into its extent of the pool."""

    ref: AdapterRef
    extent: Extent
    berth: Berth
    asked: float  # when somebody first did, by `time.perf_counter`
    after: object  # what the device has still to do before the extent may be written to (`Copies.mark`)
    fetches: bool  # from the store, too: it could not be had from the disk
    at_once: bool  # beginning its copy is all that there is to do, and takes no time


class Loader:
    """`wake` is called from a thread, or within `start`, when what was begun has ended. What asks the store has threads
    of its own, so that a store that is slow or hangs holds up no read from the disk."""

    FETCH_THREADS = 8  # they wait for a network, not for a core

    def __init__(
        self,
        pool: Pool,
        disk: DiskTier,
        copies: Copies,
        fingerprint: str,
        layout: Layout,
        threads: int,
        wake: Callable[[], None],
    ) -> None:
        self.pool, self.disk, self.copies, self.fingerprint, self.layout = pool, disk, copies, fingerprint, layout
        self.threads = threads
        self._wake = wake
        self._readers = Threads(threads, "adapterhub-read")
        self._fetchers = Threads(self.FETCH_THREADS, "adapterhub-fetch")
        self._landings = Threads(1, "adapterhub-copy")

    def start(self, errand: Errand) -> Future[Arrival]:
        """Brings the block to its extent from where it lies in host memory, or from its file. Fails with Elsewhere when
        the file must come from the store, unless `errand` says to fetch it."""
        if errand.at_once:
            future: Future[Arrival] = Future()
            settle(future, lambda: self._load(errand))
            return self._watched(future)
        threads = self._fetchers if errand.fetches else self._readers
        return self._watched(threads.submit(lambda: self._load(errand)))

    def await_copy(self, copy: Copy) -> None:
        """Wakes the engine when the copy has ended. For the engine's thread."""
        self._watched(self._landings.submit(copy.wait))

    def fetch(self, ref: AdapterRef) -> Future[None]:
        """Brings the block's file from the store to the disk."""
        return self._watched(self._fetchers.submit(lambda: self.disk.fetch(ref)))

    def close(self) -> None:
        """Waits for what is on its way, but for no disk or store that hangs."""
        for threads in (self._readers, self._fetchers):
            threads.close(GRACE_SECONDS)
        self._landings.close(0)

    def _watched(self, future: Future[T]) -> Future[T]:
        future.add_done_callback(lambda _: self._wake())
        return future

    def _load(self, errand: Errand) -> Arrival:
        """The payload goes from its file straight into the pool, or by way of its berth where it has one. What a GPU
        is to have, and has no berth, goes by way of memory that is let go afterwards: that takes longer."""
        ref, extent, (payload, meta, *_) = errand.ref, errand.extent, errand.berth
        view = self.pool.view(extent)
        if payload is None:
            payload = torch.empty(extent.numel, dtype=self.pool.dtype) if self.copies.queues else view
        if meta is None:
            read = self.disk.read if errand.fetches else self.disk.read_here
            meta = read(ref, payload, self.fingerprint)
        placed = Placed(meta, view, extent.start, self.layout)
        read_ms = (time.perf_counter() - errand.asked) * 1e3
        copy = Ended() if payload is view else self.copies.start(view, payload, errand.after)
        return Arrival(meta, placed, Loaded(read_ms, copy), payload)
