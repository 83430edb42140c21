"""The pool's own memory: blocks that move within it."""

from __future__ import annotations

import pytest
import torch

from adapterhub.swap import pool as pools
from adapterhub.swap.pool import Extent, Pool

SPARE = 8  # numbers


@pytest.mark.parametrize("numel", [1, SPARE - 1, SPARE, 3 * SPARE + 5])
@pytest.mark.parametrize("gap", [0, 1, SPARE - 1, SPARE, SPARE + 3, 40])
@pytest.mark.parametrize("down", [True, False])
def test_a_block_moves_whole_however_it_overlaps_its_new_place(
    monkeypatch: pytest.MonkeyPatch, numel: int, gap: int, down: bool
) -> None:
    monkeypatch.setattr(pools, "_SPARE_BYTES", 4 * SPARE)
    pool = Pool(4096, torch.float32, torch.device("cpu"))
    pool.tensor[:] = torch.arange(len(pool.tensor))
    before = pool.tensor.clone()
    low, high = Extent(100, numel), Extent(100 + gap, numel)
    source, target = (high, low) if down else (low, high)
    pool.move(source, target)
    moved = before[source.start : source.start + numel].clone()
    assert torch.equal(pool.view(target), moved)
    before[target.start : target.start + numel] = moved
    assert torch.equal(pool.tensor, before), "it wrote elsewhere"
