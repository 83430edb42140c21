"""The LoRA op: `y[t] += (x[t] @ A_s.T) @ B_s` for every token t of a segment with adapter s.

`add_lora` picks the backend: Triton's kernels on a GPU; native code for bf16 on a CPU; else plain torch, a loop over
segments that runs on any device and is the oracle for every other backend. While training, the kernels and torch have a
backward, which adds to each job's own gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch

from adapterhub.base.batch import Batch, TrainedAdapter
from adapterhub.base.native import ops
from adapterhub.swap.layout import Factors


def add_lora(y: torch.Tensor, x: torch.Tensor, batch: Batch, target: str, number: int) -> torch.Tensor:
    """Adds to `y` [T, n_out], in place, the segments' deltas for the linear `target`, the base's number `number`; x is
    [T, n_in]. Returns y."""
    if batch.tables is not None:
        return add_lora_together(y, x, batch, number, (y.shape[1],))
    if batch.pool is not None and ops.usable(x):
        return y.add_(ops.lora(x, y.shape[1], batch, number))
    if batch.anchor is not None:
        return _train_lora(y, x, batch, target)
    return add_lora_torch(y, x, batch, target)


def add_lora_together(
    y: torch.Tensor, x: torch.Tensor, batch: Batch, first: int, widths: tuple[int, ...]
) -> torch.Tensor:
    """`add_lora` for the base's linears `first`, `first + 1`, ..., which all read x, in one go by Triton's kernels; y
    has the `widths` columns of each, side by side."""
    from adapterhub.base.triton import backward, lora  # triton is only there where torch is built for CUDA

    if batch.gradients is not None:
        return backward.learn_lora(y, x, batch, first, widths)
    assert batch.tables is not None
    assert batch.pool is not None
    return lora.add_lora(y, x, batch.pool, batch.tables, first, widths)


def add_lora_torch(y: torch.Tensor, x: torch.Tensor, batch: Batch, target: str) -> torch.Tensor:
    """`add_lora` in plain torch, without a backward. Factors of another dtype are cast to x's."""
    for segment in batch.segments:
        factors = segment.adapter.factors.get(target)
        if factors is not None:
            rows = segment.rows
            a, b = factors.a.to(x.dtype), factors.b.to(x.dtype)
            y[rows].addmm_(x[rows] @ a.T, b)
    return y


class _Learner(NamedTuple):
    """One job's rows in a training forward, its factors of one linear, and where their gradients are added up."""

    rows: slice
    factors: Factors
    gradients: Factors


def _train_lora(y: torch.Tensor, x: torch.Tensor, batch: Batch, target: str) -> torch.Tensor:
    learners = []
    for segment in batch.segments:
        factors = segment.adapter.factors.get(target)
        if factors is not None:
            trained = cast(TrainedAdapter, segment.adapter)
            learners.append(_Learner(segment.rows, factors, trained.gradients[target]))
    return _TrainedLora.apply(y, x, batch.anchor, learners, batch.give_way) if learners else y


class _TrainedLora(torch.autograd.Function):
    """Autograd sees the tokens alone. What it would do for the parameters of every job, a few small tensors for each
    linear, is one addition to the job's fp32 gradient here."""

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        anchor: torch.Tensor,
        learners: list[_Learner],
        give_way: Callable[[], None] | None,
    ) -> torch.Tensor:
        downs = []
        for rows, factors, _ in learners:
            down = x[rows] @ factors.a.T
            y[rows].addmm_(down, factors.b)
            downs.append(down)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, *downs)
        ctx.learners, ctx.give_way = learners, give_way
        return y

    @staticmethod
    def backward(ctx: Any, gy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None, None]:
        if ctx.give_way is not None:
            ctx.give_way()
        x, *downs = ctx.saved_tensors
        gx = torch.zeros_like(x) if ctx.needs_input_grad[1] else None
        for (rows, factors, gradients), down in zip(ctx.learners, downs, strict=True):
            up = gy[rows]
            middle = up @ factors.b.T
            gradients.b.add_(_summed(down, up))
            gradients.a.add_(_summed(middle, x[rows]))
            if gx is not None:
                torch.mm(middle, factors.a, out=gx[rows])
        return gy, gx, None, None, None


def _summed(low: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """low.T @ x, a sum over rows, which fp16 could not hold."""
    if low.dtype is torch.float16:
        low, x = low.float(), x.float()
    return low.T @ x
