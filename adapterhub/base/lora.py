"""The LoRA op: `y[t] += (x[t] @ A_s.T) @ B_s` for every token t of a segment with adapter s.

This is the plain torch backend: a loop over segments, which runs on any device and under autograd, and is the oracle
for every other backend.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adapterhub.base.batch import Segment


def add_lora(y: torch.Tensor, x: torch.Tensor, segments: Sequence[Segment], target: str) -> torch.Tensor:
    """Returns `y` [T, n_out] with the segments' deltas for the linear `target` added; x is [T, n_in].

    In place where autograd does not record; factors of another dtype (a training job's fp32) are cast to x's.
    """
    for segment in segments:
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
