"""Batches to learn from by Triton's kernels: jobs' working copies stand in for the pool, and lie where they lie.

The kernels look up how far from one address a factor is. Of a pool it is the beginning; here it is the copy that lies
first in the device's memory, and the others are so many numbers away from it, in 64 bits. Gradients are found alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch

from adapterhub.base.batch import Batch, Forward, Segment, Span, TrainedAdapter, send
from adapterhub.base.places import PlacesOf
from adapterhub.base.triton.tables import tables_for
from adapterhub.swap.layout import Factors, Layout


@dataclass(frozen=True)
class Gradients:
    """Where the backward of a batch adds to: of each job, in the order of the batch's segments."""

    flat: torch.Tensor  # the flat fp32 gradient of one of them
    rows: torch.Tensor  # [jobs, 2] from start to end
    a: torch.Tensor  # [jobs, targets] how far from `flat` the gradient of each linear's A lies; -1: nowhere
    b: torch.Tensor  # the same of B
    linears: frozenset[int]  # the numbers of those that any job targets


class _InPlace(NamedTuple):
    """A job's working copy, as if in a pool."""

    rank: int
    offsets: torch.Tensor
    factors: dict[str, Factors]


class LearningBatches:
    """For jobs on a base of this `layout`."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self._layout, self._device, self._places = layout, device, PlacesOf(layout)

    def batch(self, forward: Forward, *, record: bool, give_way: Callable[[], None] | None) -> Batch:
        """`forward`, whose adapters are jobs' parameters, on the device; to have a backward, with `record`. A job has
        one segment. Nothing here waits for the device."""
        jobs = [self._places(cast(TrainedAdapter, s.adapter)) for s in forward.segments]
        pool, distances = _distances([job.factors for job in jobs])
        offsets = [_moved(job.a, distance) for job, distance in zip(jobs, distances, strict=True)]
        segments = [
            Segment(s.start, s.end, _InPlace(job.rank, at, {}))
            for s, job, at in zip(forward.segments, jobs, offsets, strict=True)
        ]
        # attention is torch's own here: to the tables, all rows are one sequence
        whole = [Span(0, len(forward.tokens), len(forward.tokens))]
        tables = tables_for(forward._replace(spans=whole, segments=segments), self._layout, self._device)
        return Batch(
            tables.tokens,
            tables.positions,
            forward.spans,
            forward.segments,
            pool=pool,
            tables=tables,
            gradients=self._gradients(forward.segments) if record and jobs else None,
            give_way=give_way,
            anchor=torch.zeros((), device=self._device, requires_grad=True) if record else None,
        )

    def _gradients(self, segments: list[Segment]) -> Gradients:
        jobs = [self._places(cast(TrainedAdapter, segment.adapter)) for segment in segments]
        flat, distances = _distances([job.gradients for job in jobs])
        assert flat is not None
        if len({id(segment.adapter) for segment in segments}) < len(segments):
            raise ValueError("A job is in two segments of a batch to learn from; lay its rows side by side.")
        a = torch.stack([_moved(job.a_gradient, distance) for job, distance in zip(jobs, distances, strict=True)])
        b = torch.stack([_moved(job.b_gradient, distance) for job, distance in zip(jobs, distances, strict=True)])
        rows = torch.tensor([[segment.start, segment.end] for segment in segments])
        targeted = frozenset((a >= 0).any(0).nonzero().squeeze(1).tolist())
        device = self._device
        return Gradients(flat, send(rows, device), send(a, device), send(b, device), targeted)


def _distances(flats: Sequence[torch.Tensor]) -> tuple[torch.Tensor | None, list[int]]:
    """The one that lies first in memory, and how many numbers after it each lies."""
    first = min(flats, key=torch.Tensor.data_ptr, default=None)
    return first, [(flat.data_ptr() - first.data_ptr()) // flat.itemsize for flat in flats if first is not None]


def _moved(places: torch.Tensor, distance: int) -> torch.Tensor:
    return torch.where(places >= 0, places + distance, -1)
