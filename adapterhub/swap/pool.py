"""The pool: one flat device tensor that holds the resident blocks, each in an extent of its own.

An adapter costs its own bytes, whatever its rank and targets. Only the engine's thread may call this, but for
`copy_in`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adapterhub.swap.allocator import ExtentAllocator
from adapterhub.swap.memory import streaming_memory


@dataclass(frozen=True)
class Extent:
    """A block's place in the pool, in elements of the pool's dtype."""

    start: int
    numel: int


class Pool:
    """`capacity` bytes on `device`. On a CPU the pages are taken from the system only as blocks fill them."""

    def __init__(self, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.allocator = ExtentAllocator(capacity)
        self.dtype = dtype
        self.device = device
        if device.type == "cpu":
            self.tensor = streaming_memory(self.allocator.capacity).view(dtype)
        else:
            self.tensor = torch.empty(self.allocator.capacity // dtype.itemsize, dtype=dtype, device=device)
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def allocate(self, numel: int) -> Extent | None:
        start = self.allocator.allocate(numel * self.dtype.itemsize)
        return None if start is None else Extent(start // self.dtype.itemsize, numel)

    def release(self, extent: Extent) -> None:
        self.allocator.release(extent.start * self.dtype.itemsize)

    def view(self, extent: Extent) -> torch.Tensor:
        """The block itself, flat [numel]."""
        return self.tensor[extent.start : extent.start + extent.numel]

    def copy_in(self, extent: Extent, block: torch.Tensor) -> None:
        """Copies a host block in, on any thread; it is there when this returns.

        On CUDA it runs on a stream of its own, so that nothing else waits for it. The kernels that are queued already
        go first: they may still read what the extent held before.
        """
        if self._copies is None:
            self.view(extent).copy_(block)
            return
        with torch.cuda.stream(self._copies):
            self._copies.wait_stream(torch.cuda.default_stream(self.device))
            self.view(extent).copy_(block, non_blocking=True)
        self._copies.synchronize()
