"""A block on the device as its users see it: residents, and the holds that requests have on them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from adapterhub.errors import HubError
from adapterhub.swap.block import BlockMeta
from adapterhub.swap.copies import Loaded
from adapterhub.swap.layout import Factors, Layout
from adapterhub.swap.ref import AdapterRef, Tier


class Placed:
    """Where a block's factors lie in the pool, for kernels as offsets and for torch as views, made when first asked."""

    def __init__(self, meta: BlockMeta, block: torch.Tensor, start: int, base: Layout) -> None:
        """`block` is the block's view of the pool, at element `start`; `base` has all targets, in order."""
        self.meta = meta
        self._base, self._block = base, block
        at = meta.layout.offsets
        offsets = [start + meta.rank * at[t.name] if t.name in at else -1 for t in base.targets]
        self.offsets = torch.tensor(offsets, dtype=torch.int64)

    @cached_property
    def factors(self) -> dict[str, Factors]:
        return {target.name: factors for target, factors in self.meta.layout.all_factors(self._block, self.meta.rank)}

    def moved(self, block: torch.Tensor, start: int) -> Placed:
        """The same block, now that it lies elsewhere."""
        return Placed(self.meta, block, start, self._base)


@dataclass
class Resident:
    """A block in the pool, or on its way there: `placed` is None until it has arrived."""

    ref: AdapterRef
    found: Tier
    asked: float  # when, by `time.perf_counter`
    away: bool = False  # it comes from the store, and has no place in the pool before it is on the disk
    landed: bool = False  # it is on the disk by now
    fetches: int = 0  # how often it was brought from the store to the disk
    placed: Placed | None = None
    error: HubError | None = None
    pins: int = 0  # holds of requests
    loaded: Loaded | None = None  # None until it is in the pool, or as good as there
    pinned: bool = False  # by its owner or an operator
    condemned: bool = False  # evict as soon as nobody uses it
    keep: bool = True  # in RAM, too, when it arrives

    @property
    def digest(self) -> str:
        return self.ref.digest

    @property
    def nbytes(self) -> int:
        return self.ref.nbytes


@dataclass
class Hold:
    """One request's pin on one version, and where the version was found."""

    resident: Resident
    tier: Tier

    @property
    def ready(self) -> bool:
        return self.resident.placed is not None

    @property
    def away(self) -> bool:
        """Whether it waits for the store."""
        return self.resident.away

    @property
    def crowded(self) -> bool:
        """Whether it has come from the store, and finds no room on the device."""
        return self.resident.away and self.resident.landed

    @property
    def factors(self) -> dict[str, Factors]:
        """Target name -> views of its A and B in the pool; like `offsets` for one step, between which blocks move."""
        return self._placed.factors

    @property
    def offsets(self) -> torch.Tensor:
        """[number of the base's targets] where each target's A lies in the pool, in elements; -1 for one it lacks."""
        return self._placed.offsets

    @property
    def rank(self) -> int:
        return self._placed.meta.rank

    @property
    def _placed(self) -> Placed:
        assert self.resident.placed is not None, "the adapter has not arrived"
        return self.resident.placed

    @property
    def error(self) -> HubError | None:
        return self.resident.error

    @property
    def load_ms(self) -> float:
        """How long it took to come to the device, in milliseconds; 0 where it was there. Waits for its copy, so to be
        asked once a step that uses it is done."""
        loaded = self.resident.loaded
        return 0.0 if self.tier is Tier.DEVICE or loaded is None else loaded.ms
