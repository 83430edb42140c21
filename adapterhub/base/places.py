"""Where a job's factors of each of the base's linears, and their gradients, lie, for kernels to look up."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from adapterhub.base.batch import TrainedAdapter
from adapterhub.swap.layout import Factors, Layout


@dataclass(frozen=True)
class Places:
    """Of one job: a flat block of factors and a flat gradient, and in them [targets] the places of A and B of each
    linear; -1 for those the job does not target."""

    rank: int
    factors: torch.Tensor
    gradients: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    a_gradient: torch.Tensor
    b_gradient: torch.Tensor


class PlacesOf:
    """Jobs' places, by the linears of a base of this `layout`; found once for each job."""

    def __init__(self, layout: Layout) -> None:
        self._names = [target.name for target in layout.targets]
        self._known: weakref.WeakKeyDictionary[TrainedAdapter, Places] = weakref.WeakKeyDictionary()

    def __call__(self, job: TrainedAdapter) -> Places:
        if job not in self._known:
            self._known[job] = Places(
                next(iter(job.factors.values())).a.shape[0],
                _flat(job.factors),
                _flat(job.gradients),
                *self._places(job.factors),
                *self._places(job.gradients),
            )
        return self._known[job]

    def _places(self, views: Mapping[str, Factors]) -> tuple[torch.Tensor, torch.Tensor]:
        found = [views.get(name) for name in self._names]
        a = torch.tensor([-1 if f is None else f.a.storage_offset() for f in found])
        b = torch.tensor([-1 if f is None else f.b.storage_offset() for f in found])
        return a, b


def _flat(views: Mapping[str, Factors]) -> torch.Tensor:
    """All of the memory that the factors are views of."""
    view = next(iter(views.values())).a
    return torch.empty(0, dtype=view.dtype, device=view.device).set_(view.untyped_storage())
