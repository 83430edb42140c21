"""Which linears a launch of the LoRA op is for, and how its kernels find a row's factors in the pool."""

# mypy: allow-untyped-defs
from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from adapterhub.base.triton.tables import Tables


@dataclass(frozen=True)
class Linears:
    """The base's linears `first`, `first + 1`, ..., which all read the same x [T, n_in]; their outputs lie side by
    side, `widths` wide."""

    first: int
    n_in: int
    widths: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.widths)

    @property
    def widest(self) -> int:
        return max(self.widths)

    def lookups(self, tables: Tables) -> tuple[torch.Tensor | int, ...]:
        """What every kernel takes: offsets, ranks, number of targets, first, starts, count, n_in."""
        starts = _starts(self.widths, tables.offsets.device)
        return (tables.offsets, tables.ranks, tables.sizes.targets, self.first, starts, self.count, self.n_in)


@cache
def _starts(widths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """[len(widths) + 1] where each linear's columns begin in y. Made once, since it waits for the device."""
    return torch.tensor([sum(widths[:i]) for i in range(len(widths) + 1)], device=device)


@triton.jit
def find(row, adapters_ptr, offsets_ptr, ranks_ptr, targets, target, ALIGNED: tl.constexpr):
    """Where a row's A begins in the pool, and its rank; 0 where nothing is to be added."""
    adapter = tl.load(adapters_ptr + row)
    at = tl.load(offsets_ptr + adapter * targets + target, mask=adapter >= 0, other=-1)
    rank = tl.load(ranks_ptr + adapter, mask=at >= 0, other=0).to(tl.int32)
    if ALIGNED:  # Triton cannot know, and would load two bytes at a time
        at = tl.multiple_of(at, 8)
    return at, rank


@triton.jit
def columns_of(starts_ptr, member, ALIGNED: tl.constexpr):
    """Where a linear's columns begin in y, and how many they are."""
    start = tl.load(starts_ptr + member).to(tl.int32)
    width = tl.load(starts_ptr + member + 1).to(tl.int32) - start
    if ALIGNED:
        start = tl.multiple_of(start, 8)
        width = tl.multiple_of(width, 8)
    return start, width


@triton.jit
def add(y_ptrs, delta, mask):
    y = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptrs, (y + delta).to(y_ptrs.dtype.element_ty), mask=mask)
