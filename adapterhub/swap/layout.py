"""Where each linear's A and B lie in a block.

A block is one flat run of `rank * width` numbers, `width` being the sum of (in + out) over the linears it targets.
Linear by linear, in the base's order: A as [rank, in], then B transposed as [rank, out]. Linears that read the same
input (q, k, v; gate, up) are neighbours in that order, so one kernel call can serve the group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Target:
    """One `nn.Linear` of the base that an adapter may change: `y = x @ W.T`, x [.., n_in], y [.., n_out]."""

    name: str
    n_in: int
    n_out: int

    @property
    def width(self) -> int:
        return self.n_in + self.n_out


class Factors(NamedTuple):
    """The two low-rank factors of one linear: a [rank, n_in], b [rank, n_out]; the delta is `(x @ a.T) @ b`."""

    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True)
class Layout:
    """The linears that a block holds, in the base's order."""

    targets: tuple[Target, ...]

    @cached_property
    def width(self) -> int:
        return sum(t.width for t in self.targets)

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Name -> the sum of the widths before it; times the rank, it is the offset of A in the block."""
        offsets, at = {}, 0
        for target in self.targets:
            offsets[target.name] = at
            at += target.width
        return offsets

    @cached_property
    def by_name(self) -> dict[str, Target]:
        return {t.name: t for t in self.targets}

    def numel(self, rank: int) -> int:
        return rank * self.width

    def subset(self, names: Iterable[str]) -> Layout:
        """The layout of an adapter that targets only `names`; the order stays the base's."""
        wanted = set(names)
        return Layout(tuple(t for t in self.targets if t.name in wanted))

    def factors(self, block: torch.Tensor, rank: int, name: str) -> Factors | None:
        """Views of A and B of one linear in a flat block [rank * width]; None when the block does not target it."""
        at = self.offsets.get(name)
        if at is None:
            return None
        target = self.by_name[name]
        start, middle, end = rank * at, rank * (at + target.n_in), rank * (at + target.width)
        return Factors(block[start:middle].view(rank, target.n_in), block[middle:end].view(rank, target.n_out))

    def all_factors(self, block: torch.Tensor, rank: int) -> Iterator[tuple[Target, Factors]]:
        for target in self.targets:
            found = self.factors(block, rank, target.name)
            assert found is not None
            yield target, found
