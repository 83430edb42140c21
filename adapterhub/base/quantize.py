"""The base's weights in 8 or 4 bits, while adapters stay in 16: `w = scale * q + minimum` in groups of 32 columns.

Torch expands a whole linear at a time to bf16 where it is used; native code multiplies in integers, or expands a few
rows at a time. The layout is the one that `native/linear.h` reads: int4 packs columns 2i and 2i + 1 into byte i, the
even one low.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import torch
from torch import nn

GROUP = 32  # columns that share a scale and a minimum


class Precision(StrEnum):
    INT8 = "int8"
    INT4 = "int4"

    @property
    def levels(self) -> int:
        return 256 if self is Precision.INT8 else 16


class QuantizedWeight(nn.Module):
    """A weight [rows, cols], cols a multiple of 32: data int8 [rows, cols] or uint8 [rows, cols / 2], scales and minima
    bf16 [rows, cols / 32]. A minimum is what q = 0 stands for."""

    data: torch.Tensor
    scales: torch.Tensor
    minima: torch.Tensor

    def __init__(self, precision: Precision, data: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor) -> None:
        super().__init__()
        self.precision = precision
        for name, tensor in (("data", data), ("scales", scales), ("minima", minima)):
            self.register_buffer(name, tensor, persistent=False)

    @property
    def shape(self) -> tuple[int, int]:
        return self.scales.shape[0], self.scales.shape[1] * GROUP

    def expand(self) -> torch.Tensor:
        """The weight in bf16 [rows, cols]."""
        rows, cols = self.shape
        if self.precision is Precision.INT4:
            q = torch.stack((self.data & 15, self.data >> 4), dim=-1).view(rows, cols // GROUP, GROUP)
        else:
            q = self.data.view(rows, cols // GROUP, GROUP)
        scale, minimum = self.scales.float().unsqueeze(-1), self.minima.float().unsqueeze(-1)
        return (q.float() * scale + minimum).bfloat16().view(rows, cols)


def can_quantize(weight: torch.Tensor) -> bool:
    return weight.ndim == 2 and weight.shape[1] % GROUP == 0


def quantize(weight: torch.Tensor, precision: Precision) -> QuantizedWeight:
    """Rounds each number to the nearest of its group's levels, which lie evenly between its extremes."""
    rows, cols = weight.shape
    groups = weight.detach().float().view(rows, cols // GROUP, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    zero = 128 if precision is Precision.INT8 else 0  # the level that q = 0 is
    scales = ((high - low) / (precision.levels - 1)).clamp_min(1e-12).bfloat16()
    minima = (low + zero * scales.float()).bfloat16()
    q = ((groups - minima.float().unsqueeze(-1)) / scales.float().unsqueeze(-1)).round()
    q = q.clamp(-zero, precision.levels - 1 - zero).view(rows, cols)
    if precision is Precision.INT8:
        return QuantizedWeight(precision, q.to(torch.int8), scales, minima)
    pairs = q.to(torch.uint8).view(rows, cols // 2, 2)
    return QuantizedWeight(precision, pairs[..., 0] | pairs[..., 1] << 4, scales, minima)


class QuantizedLinear(nn.Module):
    """`nn.Linear` with a quantized weight: what a base's output embedding becomes."""

    def __init__(self, weight: QuantizedWeight, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.quantized, self.bias = weight, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return quantized_product(x, self.quantized, self.bias)


def quantized_product(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ W.T + bias. Training through it keeps no expanded weight: the backward expands it anew."""
    y: torch.Tensor = _Product.apply(x, weight)
    return y if bias is None else y + bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
        ctx.weight = weight
        return nn.functional.linear(x, weight.expand().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.weight.expand().to(gradient.dtype), None
