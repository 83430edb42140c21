"""The pool: one flat device tensor that holds the resident blocks, each in an extent of its own.

An adapter costs its own bytes, whatever its rank and targets. Where blocks lie is decided elsewhere (`residency.py`).
Only the engine's thread may call this, but for `view` and `copy_in`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from adapterhub.swap.allocator import ALIGNMENT
from adapterhub.swap.memory import streaming_memory


class Extent(NamedTuple):
    """A block's place in the pool, in elements of the pool's dtype."""

    start: int
    numel: int


class Pool:
    """`capacity` bytes on `device`. On a CPU the pages are taken from the system only as blocks fill them.

    `tensor` is another one after the pool's size has changed: whoever uses it reads it anew at each step.
    """

    def __init__(self, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self.tensor = self.memory(capacity)
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def capacity(self) -> int:
        return self.tensor.nbytes

    def memory(self, capacity: int) -> torch.Tensor:
        """What could take the tensor's place: `capacity` bytes, uninitialized. Raises torch.OutOfMemoryError."""
        capacity = capacity // ALIGNMENT * ALIGNMENT
        if self.device.type == "cpu":
            return streaming_memory(capacity).view(self.dtype)
        return torch.empty(capacity // self.dtype.itemsize, dtype=self.dtype, device=self.device)

    def extent(self, start: int, nbytes: int) -> Extent:
        """Of a block of so many bytes that begins at byte `start`."""
        return Extent(start // self.dtype.itemsize, nbytes // self.dtype.itemsize)

    def view(self, extent: Extent) -> torch.Tensor:
        """The block itself, flat [numel]."""
        return self.tensor[extent.start : extent.start + extent.numel]

    def move(self, source: Extent, target: Extent) -> None:
        """Copies a block to a place that may overlap its own; on CUDA after the kernels that are queued already."""
        block = self.view(source)
        apart = abs(source.start - target.start) >= source.numel
        self.view(target).copy_(block if apart else block.clone())

    def adopt(self, memory: torch.Tensor, blocks: Iterable[tuple[Extent, Extent]]) -> None:
        """Goes on in `memory`: each block is copied from its place here to its place there. Nothing may be on its way
        into the pool."""
        old, self.tensor = self.tensor, memory
        for source, target in blocks:
            self.view(target).copy_(old[source.start : source.start + source.numel])

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
