"""Blocks of random numbers, for scripts that need many adapters and no training."""

from __future__ import annotations

import torch

from adapterhub.base.denoiser import Denoiser
from adapterhub.base.model import Base
from adapterhub.swap.block import Block, BlockMeta
from adapterhub.swap.layout import Layout


def random_block(base: Base | Denoiser, layout: Layout, rank: int, seed: int, size: float) -> Block:
    """An adapter for `base` on the linears of `layout`, its numbers normal with the deviation `size`, drawn where the
    base is."""
    generator = torch.Generator(base.device).manual_seed(seed)
    count = len(layout.targets)
    meta = BlockMeta(base.fingerprint, rank, layout, (rank,) * count, (1.0,) * count, {"seed": seed}, base.dtype)
    numbers = torch.randn(layout.numel(rank), generator=generator, device=base.device)
    return Block(meta, numbers.mul_(size).to(base.dtype).cpu())
