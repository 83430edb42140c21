"""The reading threads: they bring blocks from RAM or from below it into extents that were set aside for them."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from adapterhub.swap.block import BlockMeta
from adapterhub.swap.disk import DiskTier
from adapterhub.swap.hold import Placed
from adapterhub.swap.layout import Layout
from adapterhub.swap.pool import Extent, Pool
from adapterhub.swap.ref import AdapterRef


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


class Loader:
    """`wake` is called from a reading thread when a load has ended."""

    def __init__(
        self, pool: Pool, disk: DiskTier, fingerprint: str, layout: Layout, threads: int, wake: Callable[[], None]
    ) -> None:
        self.pool, self.disk, self.fingerprint, self.layout = pool, disk, fingerprint, layout
        self.threads = threads
        self._wake = wake
        self._readers = ThreadPoolExecutor(threads, thread_name_prefix="adapterhub-read")

    def start(self, ref: AdapterRef, extent: Extent, host: HostBlock | None, keep: bool) -> Future[Arrival]:
        """Brings `host`, or where it is None the block's file, to `extent`; `keep` says that RAM will keep it."""
        started = time.perf_counter()

        def load() -> Arrival:
            block, placed = self._load(ref, extent, host, keep)
            return Arrival(block, placed, (time.perf_counter() - started) * 1e3)

        future = self._readers.submit(load)
        future.add_done_callback(lambda _: self._wake())
        return future

    def close(self) -> None:
        self._readers.shutdown(wait=True, cancel_futures=True)

    def _load(self, ref: AdapterRef, extent: Extent, host: HostBlock | None, keep: bool) -> tuple[HostBlock, Placed]:
        """The payload goes from its file into its extent, by way of RAM where that keeps it, or a GPU, which is reached
        from pinned memory."""
        view = self.pool.view(extent)
        if host is None:
            on_cpu = self.pool.device.type == "cpu"
            if on_cpu and not keep:
                payload = view
            else:
                payload = torch.empty(extent.numel, dtype=self.pool.dtype, pin_memory=not on_cpu)
            host = HostBlock(self.disk.read(ref, payload, self.fingerprint), payload)
        if host.payload is not view:
            self.pool.copy_in(extent, host.payload)
        return host, Placed(host.meta, view, extent.start, self.layout)
