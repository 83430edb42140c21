"""The pool: one flat device tensor that holds the resident blocks, each in an extent of its own.

An adapter costs its own bytes, whatever its rank and targets. Where blocks lie is decided elsewhere (`residency.py`).
Only the engine's thread may call this, but for `view`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from adapterhub.swap.allocator import ALIGNMENT
from adapterhub.swap.gpu import empty_cache
from adapterhub.swap.memory import streaming_memory

_SPARE_BYTES = 1024**2


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
        self._spare = torch.empty(_SPARE_BYTES // dtype.itemsize, dtype=dtype, device=device)  # for `move`

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
        """Copies a block to a place that may overlap its own; on CUDA after the kernels that are queued already. It
        needs no more memory than there is, so that it cannot fail for want of it."""
        down, gap = target.start < source.start, abs(source.start - target.start)
        pieces = range(0, source.numel, max(gap, len(self._spare)))
        for at in pieces if down else reversed(pieces):
            numel = min(pieces.step, source.numel - at)
            piece = self.view(Extent(source.start + at, numel))
            if gap < numel:  # it would overlap itself
                piece = self._spare[:numel].copy_(piece)
            self.view(Extent(target.start + at, numel)).copy_(piece)

    def adopt(self, memory: torch.Tensor, blocks: Iterable[tuple[Extent, Extent]]) -> None:
        """Goes on in `memory`: each block is copied from its place here to its place there. Nothing may be on its way
        into the pool."""
        old, self.tensor = self.tensor, memory
        for source, target in blocks:
            self.view(target).copy_(old[source.start : source.start + source.numel])
        self._free(old)

    def let_go(self) -> None:
        """Gives its memory back, to which no block may lead any more. `tensor` is empty until it is set anew."""
        old, self.tensor = self.tensor, self.tensor.new_empty(0)
        self._free(old)

    def _free(self, memory: torch.Tensor) -> None:
        if self.device.type == "cuda":
            memory.untyped_storage().resize_(0)  # at once, although graphs that were captured on it have it yet
            empty_cache()
