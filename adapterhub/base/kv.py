"""The KV cache: a fixed number of blocks of a few tokens each, handed to sequences by a host-side table (`blocks.py`).

Only the engine's thread may call this.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from adapterhub.base.batch import KV_BLOCK as BLOCK
from adapterhub.base.batch import Span
from adapterhub.base.blocks import BlockTable


class KVShape(NamedTuple):
    """One layer's keys and values for one token: [heads, key_dim] and [heads, value_dim]."""

    heads: int
    key_dim: int
    value_dim: int

    @property
    def numel(self) -> int:
        return self.heads * (self.key_dim + self.value_dim)


class KVCache:
    """`nbytes` of keys and values for the layers in `shapes`. On a CPU pages are taken only as tokens fill them.

    What has as many numbers for a token, in most bases all of it, is one piece of memory: a block is cleared in one go.
    """

    def __init__(self, shapes: Mapping[int, KVShape], nbytes: int, dtype: torch.dtype, device: torch.device) -> None:
        per_token = sum(s.numel for s in shapes.values()) * dtype.itemsize
        num_blocks = nbytes // (per_token * BLOCK)
        slots = num_blocks * BLOCK
        parts = [(s.heads, dim) for s in shapes.values() for dim in (s.key_dim, s.value_dim)]
        self._pieces = {
            width: _lazy_zeros((count, num_blocks, BLOCK * width), dtype, device)
            for width, count in Counter(heads * dim for heads, dim in parts).items()
        }
        left = {width: iter(piece) for width, piece in self._pieces.items()}
        caches = [next(left[heads * dim]).view(slots, heads, dim) for heads, dim in parts]
        self._k = dict(zip(shapes, caches[::2], strict=True))
        self._v = dict(zip(shapes, caches[1::2], strict=True))
        self._cleared = torch.zeros(num_blocks, dtype=torch.long, device=device)  # which blocks; nothing else is needed
        self.blocks = BlockTable(num_blocks, self._clear)

    @property
    def capacity(self) -> int:
        """Tokens that fit in all."""
        return self.blocks.total * BLOCK

    @staticmethod
    def blocks_for(tokens: int) -> int:
        return -(-tokens // BLOCK)

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor | None) -> None:
        """k [heads, T, key_dim] and v [heads, T, value_dim] into slots [T]."""
        assert slots is not None
        self._k[layer][slots] = k.transpose(0, 1)
        self._v[layer][slots] = v.transpose(0, 1)

    def read(self, layer: int, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole context of one sequence: [heads, context, dim] each."""
        k, v = self.read_many(layer, torch.tensor([span.blocks], device=self._k[layer].device))
        return k[0, : span.context].transpose(0, 1), v[0, : span.context].transpose(0, 1)

    def read_many(self, layer: int, tables: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Block tables [n, m] -> keys and values [n, m * BLOCK, heads, dim]; what lies past a context is arbitrary."""
        n, m = tables.shape
        found = []
        for cache in (self._k[layer], self._v[layer]):
            found.append(self._paged(cache)[tables].view(n, m * BLOCK, *cache.shape[1:]))
        return found[0], found[1]

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer's keys [slots, heads, key_dim] and values [slots, heads, value_dim]."""
        return self._k[layer], self._v[layer]

    def _paged(self, cache: torch.Tensor) -> torch.Tensor:
        return cache.view(self.blocks.total, BLOCK, *cache.shape[1:])

    def _clear(self, blocks: list[int]) -> None:
        """A masked NaN still spoils a sum, so what one sequence left in a block must not reach the next."""
        numbers = torch.tensor(blocks, pin_memory=self._cleared.is_cuda)  # or the host would wait for the device
        index = self._cleared[: len(blocks)].copy_(numbers, non_blocking=True)
        for piece in self._pieces.values():
            piece.index_fill_(1, index, 0)


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros whose pages a CPU's system hands out at their first use (`torch.zeros` would touch them all at once)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    count = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(count, dtype=np.uint8)).view(dtype).view(shape)


class ShapeProbe:
    """Stands in for the cache in the first forward of a base, to learn what its layers keep."""

    def __init__(self) -> None:
        self.shapes: dict[int, KVShape] = {}

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor | None) -> None:
        self.shapes[layer] = KVShape(k.shape[0], k.shape[2], v.shape[2])

    def read(self, layer: int, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("the probe's context is in its forward")

    def read_many(self, layer: int, tables: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("the probe's context is in its forward")

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("the probe keeps shapes only")
