"""Attention over all sequences of a training forward in one launch, by torch's `varlen_attn`: on a GPU, in 16 bits.

Torch has it from 2.11 on, and may change it. So it is tried once for each shape, forward and backward, against
`scaled_dot_product_attention`; where it fails or differs, sequences are computed one by one, with one warning.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

log = logging.getLogger(__name__)
_LENGTHS = (5, 1, 40, 17)  # of the sequences that it is tried with
_WINDOW = 6
_TOLERANCE = 0.03  # of the norm; what is rounded to 16 bits is off by less than 0.01


class Shape(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    dim: int
    window: bool


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ends: torch.Tensor,
    longest: int,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """q [heads, T, d], k and v [kv_heads, T, d] of sequences laid end to end, each causal -> [T, heads, d]. `ends`, in
    int32, is 0 and where each ends; the longest has `longest` tokens. A token sees itself and `window` - 1 others."""
    found = _varlen_attn()
    assert found is not None, "check `usable` first"
    more = {"enable_gqa": len(q) != len(k)} if _takes(found, "enable_gqa") else {}
    sides = (-1 if window is None or longest <= window else window - 1, 0)
    tokens = (part.transpose(0, 1) for part in (q, k, v))
    return found(*tokens, ends, ends, longest, longest, scale=scale, window_size=sides, **more)


def usable(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> bool:
    """Whether `attend` is right for such q, k and v."""
    if not _possible(q) or q.shape[-1] != v.shape[-1]:
        return False
    return _works(Shape(q.device, q.dtype, len(q), len(k), q.shape[-1], window is not None))


def _possible(q: torch.Tensor) -> bool:
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(q.device) >= (8, 0) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def _varlen_attn() -> Callable[..., Any] | None:
    """None where torch has none, or an older one that knows no windows."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if _takes(varlen_attn, "window_size") else None


@cache
def _takes(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters


@cache
def _works(shape: Shape) -> bool:
    if _varlen_attn() is None:
        return False
    try:
        error = _tried(shape)
    except Exception as reason:
        _warn(f"{type(reason).__name__}: {reason}")
        return False
    if not error <= _TOLERANCE:  # NaN is not
        _warn(f"it is off by {error:.2g} of its norm for {shape}")
        return False
    return True


@cache
def _warn(reason: str) -> None:
    log.warning("Training attends to sequences one by one, since torch's varlen_attn does not work here: %s", reason)


def _tried(shape: Shape) -> float:
    """How far it is from what it must be, output and gradients."""
    generator = torch.Generator().manual_seed(0)
    total, scale = sum(_LENGTHS), shape.dim**-0.5
    q, k, v, slope = (
        torch.randn(heads, total, shape.dim, generator=generator).to(shape.device, shape.dtype)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    )
    window = _WINDOW if shape.window else None
    ends = torch.tensor([0, *_LENGTHS], device=shape.device).cumsum(0).int()
    inputs = [part.requires_grad_() for part in (q, k, v)]
    with torch.enable_grad():
        out = attend(q, k, v, ends, max(_LENGTHS), scale, window).transpose(0, 1)
        found = (out, *torch.autograd.grad(out, inputs, slope))
        out = _one_by_one(q, k, v, _LENGTHS, scale, window)
        expected = (out, *torch.autograd.grad(out, inputs, slope.float()))
    errors = [(f.float() - e.float()).norm() / e.float().norm() for f, e in zip(found, expected, strict=True)]
    return float(torch.stack(errors).detach().amax())


def _one_by_one(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int], scale: float, window: int | None
) -> torch.Tensor:
    """The same in fp32."""
    parts = []
    for one_q, one_k, one_v in zip(*(part.float()[None].split(lengths, 2) for part in (q, k, v)), strict=True):
        ones = torch.ones(one_q.shape[2], one_q.shape[2], dtype=torch.bool, device=q.device)
        sees = ones.tril() if window is None else ones.tril().triu(1 - window)
        parts.append(scaled_dot_product_attention(one_q, one_k, one_v, sees, scale=scale, enable_gqa=True))
    return torch.cat(parts, 2)[0]
