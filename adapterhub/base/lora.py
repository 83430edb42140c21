"""The LoRA op: `y[t] += (x[t] @ A_s.T) @ B_s` for every token t of a segment with adapter s.

`add_lora` picks the backend: native code for bf16 on a CPU, else plain torch, a loop over segments that runs on any
device and under autograd, and is the oracle for every other backend.
"""

from __future__ import annotations

import torch

from adapterhub.base.batch import Batch
from adapterhub.base.native import ops


def add_lora(y: torch.Tensor, x: torch.Tensor, batch: Batch, target: str, number: int) -> torch.Tensor:
    """Returns `y` [T, n_out] with the segments' deltas added for the linear `target`, the base's number `number`; x is
    [T, n_in]. In place where autograd does not record."""
    if batch.pool is not None and ops.usable(x):
        return y.add_(ops.lora(x, y.shape[1], batch, number))
    return add_lora_torch(y, x, batch, target)


def add_lora_torch(y: torch.Tensor, x: torch.Tensor, batch: Batch, target: str) -> torch.Tensor:
    """`add_lora` in plain torch. Factors of another dtype (a training job's fp32) are cast to x's."""
    for segment in batch.segments:
        factors = segment.adapter.factors.get(target)
        if factors is None:
            continue
        rows = slice(segment.start, segment.end)
        a, b = factors.a.to(x.dtype), factors.b.to(x.dtype)
        if torch.is_grad_enabled():
            whole = segment.start == 0 and segment.end == len(x)
            delta = (x[rows] @ a.T) @ b
            y = y + delta if whole else y.index_add(0, torch.arange(segment.start, segment.end, device=y.device), delta)
        else:
            y[rows].addmm_(x[rows] @ a.T, b)
    return y
