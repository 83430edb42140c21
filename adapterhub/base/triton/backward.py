"""The LoRA op of a training forward by Triton's kernels. Autograd sees the rows alone: what is learned is added to each
job's own fp32 gradient."""

from __future__ import annotations

from typing import Any

import torch

from adapterhub.base.batch import Batch
from adapterhub.base.triton import tiles
from adapterhub.base.triton.finding import Linears


def learn_lora(y: torch.Tensor, x: torch.Tensor, batch: Batch, first: int, widths: tuple[int, ...]) -> torch.Tensor:
    """`add_lora`, with a backward, for a batch with `gradients`."""
    assert batch.gradients is not None
    if batch.gradients.linears.isdisjoint(range(first, first + len(widths))):
        return y
    return _Learned.apply(y, x, batch.anchor, batch, Linears(first, x.shape[1], widths))


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, x: torch.Tensor, anchor: torch.Tensor, batch: Batch, linears: Linears
    ) -> torch.Tensor:
        assert batch.pool is not None
        assert batch.tables is not None
        x = x.contiguous()
        low = tiles.shrink(x, batch.pool, batch.tables, linears, learning=True)
        kept = torch.empty_like(low[0], dtype=x.dtype)
        tiles.expand(y, low, batch.pool, batch.tables, linears, kept)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, kept)
        ctx.batch, ctx.linears = batch, linears
        return y

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None, None]:
        batch, linears = ctx.batch, ctx.linears
        if batch.give_way is not None:
            batch.give_way()
        x, low = ctx.saved_tensors
        slope = slope.contiguous()
        parts = tiles.shrink_back(slope, batch.pool, batch.tables, linears)
        middle = torch.empty_like(low)
        everywhere = sum(segment.end - segment.start for segment in batch.segments) == len(x)
        gradient = torch.empty_like(x) if everywhere else torch.zeros_like(x)
        tiles.expand_back(gradient, parts, batch.pool, batch.tables, linears, middle)
        tiles.add_gradients(batch.gradients, x, slope, low, middle, batch.tables, linears)
        return slope, gradient, None, None, None
