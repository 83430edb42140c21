"""What the device can do at best, measured in the same run as the figures that stand beside it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from figure import Figure

_REPEATS = 10


class Limits(NamedTuple):
    """Medians: bytes per second that a copy on the device reads and writes, and that reach it from the host; operations
    per second of a product in bf16."""

    copy: float
    upload: float
    product: float
    figures: list[Figure]


def synchronize(device: torch.device) -> None:
    """Waits for what was launched; a CPU has done it already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, work: Callable[[], object], repeats: int = _REPEATS) -> list[float]:
    """How long `work` takes, after two runs to warm up."""
    times = []
    for _ in range(repeats + 2):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return times[2:]


def measure_limits(device: torch.device, quick: bool) -> Limits:
    size = 2**24 if quick else 2**31  # bytes
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    copy = [2 * size / s for s in seconds(device, lambda: target.copy_(source))]
    side = 256 if quick else 8192
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    product = [2 * side**3 / s for s in seconds(device, lambda: a @ b)]
    host = torch.zeros(size // 32, pin_memory=device.type == "cuda")
    here = torch.empty_like(host, device=device)
    upload = [host.nbytes / s for s in seconds(device, lambda: here.copy_(host, non_blocking=True))]
    return Limits(
        statistics.median(copy),
        statistics.median(upload),
        statistics.median(product),
        [
            Figure.of("copy within the device, read and written", "GB/s", [r / 1e9 for r in copy]),
            Figure.of(f"bf16 product of {side} x {side} matrices", "TFLOP/s", [r / 1e12 for r in product]),
            Figure.of("copy from the host, pinned where there is a GPU", "GB/s", [r / 1e9 for r in upload]),
        ],
    )
