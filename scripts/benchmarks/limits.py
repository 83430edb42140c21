"""What this machine can do at best, measured in the same run as the figures that stand beside it."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable

import torch

_REPEATS = 15


def median_seconds(work: Callable[[], object], repeats: int = _REPEATS) -> float:
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def memory_bandwidth() -> float:
    """Bytes per second that all cores together read from memory."""
    block = torch.ones(512 * 1024**2 // 8, dtype=torch.int64)
    return block.nbytes / median_seconds(block.sum, 7)


def matrix_rate(rows: int) -> float:
    """Operations per second of a bf16 product of `rows` rows with weights of a few MB, as torch does it."""
    weight = torch.randn(1536, 576 * 4).bfloat16()
    x = torch.randn(rows, weight.shape[1]).bfloat16()
    return 2 * rows * weight.numel() / median_seconds(lambda: torch.nn.functional.linear(x, weight), 50)


def read_seconds(size: int) -> float:
    """To read `size` bytes from the page cache into memory that is there already: the least a cold boot can take."""
    buffer = bytearray(size)
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(bytes(size))
        return median_seconds(lambda: os.preadv(file.fileno(), [buffer], 0))
