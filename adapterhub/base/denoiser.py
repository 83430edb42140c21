"""A denoiser that serves many adapters: samples, each with an adapter of its own or with none, are one forward.

It may be any model whose forward takes a batch of samples, as diffusers' UNets and transformers do. Its linears are
multiplexed as those of text are; attention stays the model's own, since the samples of a batch are of one size. A
linear reads so many rows of each sample, one sample after the other: few at a low resolution, many at a high one,
others again of the prompt. So segments and tables are made once in a step for each number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from adapterhub.base.batch import Batch, Forward, PooledAdapter, Segment, Span, send
from adapterhub.base.inject import groups_of, inputs_of_linears, merge, multiplex
from adapterhub.base.model import fingerprint_of
from adapterhub.base.triton import usable
from adapterhub.base.triton.tables import Tables, tables_for, tiles_of
from adapterhub.swap.layout import Layout
from adapterhub.swap.pool import Pool


@dataclass(frozen=True)
class Denoiser:
    """The resident model, and what the rest needs to know of it. Only the engine's thread may run it."""

    model: nn.Module
    layout: Layout  # every linear an adapter can target
    fingerprint: str
    slot: SampleSlot

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def step(
        self, adapters: Sequence[PooledAdapter | None], pool: Pool, samples: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """One forward of the model over `samples` [n, ..], of which sample i has `adapters[i]`, whose block is in
        `pool`. What else the model takes, and what it returns, is the model's. A request with guidance is two samples,
        each of which names its adapter. Raises ValueError when not every sample has one, or None."""
        if len(samples) != len(adapters):
            raise ValueError(
                f"There are {len(samples)} samples and {len(adapters)} adapters; name one, or None, for each sample."
            )
        with torch.no_grad(), self.slot.denoising(_Samples(adapters, self.layout, pool)):
            return self.model(samples, *args, **kwargs)


def prepare_denoiser(model: nn.Module, samples: torch.Tensor, *args: Any, **kwargs: Any) -> Denoiser:
    """Turns a loaded model, in place, into one that serves. The rest is what a short forward of it takes, to see which
    linears read rows of each sample: several `samples` [n, ..], small ones, n being a number of which nothing else
    is likely to be a multiple, such as 3."""
    model.requires_grad_(False).eval()
    fingerprint = fingerprint_of(model)

    def reads_samples(_: nn.Linear, x: torch.Tensor) -> bool:
        return x.shape[:-1].numel() % len(samples) == 0

    inputs = inputs_of_linears(model, reads_samples, partial(model, samples, *args, **kwargs))
    slot = SampleSlot()
    layout = multiplex(model, inputs, slot)
    if usable(samples.device):
        merge(model, groups_of(inputs))
    return Denoiser(model, layout, fingerprint, slot)


class SampleSlot:
    """Where a denoiser's linears look up the batch that fits what they read. One per loaded denoiser."""

    def __init__(self) -> None:
        self._samples: _Samples | None = None

    def batch_of(self, rows: int) -> Batch | None:
        return None if self._samples is None else self._samples.batch_of(rows)

    @contextmanager
    def denoising(self, samples: _Samples) -> Iterator[None]:
        """Within the block the linears work on these."""
        self._samples = samples
        try:
            yield
        finally:
            self._samples = None


class _Samples:
    """The samples of one step and their adapters, as a batch of rows for each number of rows that a linear reads."""

    def __init__(self, adapters: Sequence[PooledAdapter | None], layout: Layout, pool: Pool) -> None:
        self._count, self._pool = len(adapters), pool
        self._segments = list(_segments(adapters))
        self._tables: Tables | None = None  # of one row for each sample
        if usable(pool.device):
            none, spans = [0] * self._count, [Span(i, 1, 1) for i in range(self._count)]
            self._tables = tables_for(Forward(none, none, none, [], spans, self._segments), layout, pool.device)
        self._batches: dict[int, Batch] = {}

    def batch_of(self, rows: int) -> Batch:
        """Raises ValueError unless every sample has as many of them."""
        if rows not in self._batches:
            each, left = divmod(rows, self._count)
            if left:
                raise ValueError(f"A linear reads {rows} rows, which {self._count} samples cannot share evenly.")
            segments = [Segment(s.start * each, s.end * each, s.adapter) for s in self._segments]
            none = torch.empty(0, dtype=torch.int64, device=self._pool.device)  # there are no tokens
            tables = None if self._tables is None else _repeated(self._tables, each, segments)
            self._batches[rows] = Batch(none, none, [], segments, pool=self._pool.tensor, tables=tables)
        return self._batches[rows]


def _repeated(tables: Tables, each: int, segments: list[Segment]) -> Tables:
    """What kernels of the LoRA op look up where each row of `tables` has become `each` rows; the adapters and where
    they lie are shared. Nothing here waits for the device."""
    if each == 1 or not segments:
        return tables
    tiles = send(torch.tensor(list(tiles_of(segments))), tables.tiles.device)
    adapters = tables.adapters.unsqueeze(1).repeat(1, each).flatten()
    return replace(tables, adapters=adapters, tiles=tiles, lora_tiles=tiles)


def _segments(adapters: Sequence[PooledAdapter | None]) -> Iterator[Segment]:
    """Of samples: one for each run of neighbours that have the same adapter."""
    start = 0
    for end, adapter in enumerate(adapters, 1):
        if end == len(adapters) or adapters[end] is not adapter:
            if adapter is not None:
                yield Segment(start, end, adapter)
            start = end
