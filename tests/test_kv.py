"""The KV cache's memory: where layers lie, and that a block that changes hands is empty in all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adapterhub.base.batch import KV_BLOCK, Span
from adapterhub.base.kv import KVCache, KVShape

CPU = torch.device("cpu")
ALIKE = {layer: KVShape(2, 8, 8) for layer in range(12)}
MIXED = {0: KVShape(2, 8, 8), 3: KVShape(4, 8, 12), 5: KVShape(1, 16, 4)}  # rows of 16, 32, 48 and 4 numbers


class Fills(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.index_fill_.int_Scalar
        return func(*args, **(kwargs or {}))


def cache_of(shapes: dict[int, KVShape], blocks: int = 5) -> KVCache:
    per_block = KV_BLOCK * sum(shape.numel for shape in shapes.values()) * 4
    cache = KVCache(shapes, blocks * per_block + per_block // 2, torch.float32, CPU)
    assert cache.blocks.total == blocks
    return cache


@pytest.mark.parametrize("shapes", [ALIKE, MIXED])
def test_layers_have_places_of_their_own(shapes: dict[int, KVShape]) -> None:
    cache = cache_of(shapes)
    slots, written = torch.arange(cache.capacity), {}
    for layer, shape in shapes.items():
        assert not any(part.any() for part in cache.layer(layer))
        key, value = (torch.randn(shape.heads, len(slots), dim) for dim in (shape.key_dim, shape.value_dim))
        cache.write(layer, key, value, slots)
        written[layer] = (key, value)
    span = Span(0, 1, cache.capacity, tuple(range(cache.blocks.total)))
    for layer, (key, value) in written.items():
        found = cache.read(layer, span)
        assert torch.equal(found[0], key)
        assert torch.equal(found[1], value)


@pytest.mark.parametrize(("shapes", "fills"), [(ALIKE, 1), (MIXED, 4)])
def test_blocks_that_change_hands_are_empty_in_every_layer_and_no_others_with_few_launches(
    shapes: dict[int, KVShape], fills: int
) -> None:
    cache = cache_of(shapes)
    for layer in shapes:
        for part in cache.layer(layer):
            part.fill_(1)
    blocks = cache.blocks.allocate(5)
    assert blocks is not None
    with Fills() as watched:
        cache.blocks.release([blocks[1], blocks[3]])
    assert watched.count == fills
    for layer in shapes:
        for part in cache.layer(layer):
            left = [bool(part[block * KV_BLOCK : (block + 1) * KV_BLOCK].any()) for block in blocks]
            assert left == [True, False, True, False, True]
