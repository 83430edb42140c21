"""The reading threads: they bring blocks from RAM or from the disk into extents that were set aside for them, and from
the store to the disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple, TypeVar

import torch

from adapterhub.swap.block import BlockMeta
from adapterhub.swap.disk import DiskTier
from adapterhub.swap.hold import Placed
from adapterhub.swap.layout import Layout
from adapterhub.swap.pool import Extent, Pool
from adapterhub.swap.ref import AdapterRef
from adapterhub.swap.threads import Threads

GRACE_SECONDS = 5.0  # for reads that are under way when the server stops
T = TypeVar("T")


class HostBlock(NamedTuple):
    meta: BlockMeta
    payload: torch.Tensor

    @property
    def nbytes(self) -> int:
        """What it takes of RAM: torch rounds the pinned memory that a GPU is reached from up to a power of two."""
        size = self.meta.nbytes
        return 1 << (size - 1).bit_length() if self.payload.is_pinned() else size


class Arrival(NamedTuple):
    """What a reading thread brings: the block in host memory, where it lies in the pool, and how long it took from when
    it was asked for."""

    block: HostBlock
    placed: Placed
    load_ms: float


class Source(NamedTuple):
    """How a block is to be had."""

    asked: float  # when somebody first asked for it, by `time.perf_counter`
    keep: bool  # RAM will keep it
    fetches: bool  # from the store, too: it could not be had from the disk


class Loader:
    """`wake` is called from a thread when what it does has ended. What asks the store has threads of its own, so that a
    store that is slow or hangs holds up no read from the disk."""

    FETCH_THREADS = 8  # they wait for a network, not for a core

    def __init__(
        self, pool: Pool, disk: DiskTier, fingerprint: str, layout: Layout, threads: int, wake: Callable[[], None]
    ) -> None:
        self.pool, self.disk, self.fingerprint, self.layout = pool, disk, fingerprint, layout
        self.threads = threads
        self._wake = wake
        self._readers = Threads(threads, "adapterhub-read")
        self._fetchers = Threads(self.FETCH_THREADS, "adapterhub-fetch")

    def start(self, ref: AdapterRef, extent: Extent, host: HostBlock | None, source: Source) -> Future[Arrival]:
        """Brings `host`, or where it is None the block's file, to `extent`. Fails with Elsewhere when the file must
        come from the store, unless `source` says to fetch it."""
        threads = self._fetchers if source.fetches else self._readers
        return self._watched(threads.submit(lambda: self._load(ref, extent, host, source)))

    def fetch(self, ref: AdapterRef) -> Future[None]:
        """Brings the block's file from the store to the disk."""
        return self._watched(self._fetchers.submit(lambda: self.disk.fetch(ref)))

    def close(self) -> None:
        """Waits for what is on its way, but for no disk or store that hangs."""
        for threads in (self._readers, self._fetchers):
            threads.close(GRACE_SECONDS)

    def _watched(self, future: Future[T]) -> Future[T]:
        future.add_done_callback(lambda _: self._wake())
        return future

    def _load(self, ref: AdapterRef, extent: Extent, host: HostBlock | None, source: Source) -> Arrival:
        """The payload goes from its file into its extent, by way of RAM where that keeps it, or a GPU, which is reached
        from pinned memory."""
        view = self.pool.view(extent)
        if host is None:
            on_cpu = self.pool.device.type == "cpu"
            if on_cpu and not source.keep:
                payload = view
            else:
                payload = torch.empty(extent.numel, dtype=self.pool.dtype, pin_memory=not on_cpu)
            read = self.disk.read if source.fetches else self.disk.read_here
            host = HostBlock(read(ref, payload, self.fingerprint), payload)
        if host.payload is not view:
            self.pool.copy_in(extent, host.payload)
        placed = Placed(host.meta, view, extent.start, self.layout)
        return Arrival(host, placed, (time.perf_counter() - source.asked) * 1e3)
