"""What all GPUs of a process share: torch's allocator empties its caches on all of them at once, which fails, and
breaks the capture, while a graph is captured on any."""

from __future__ import annotations

import threading

import torch

# held by who captures a graph; it must not be asked for again by what is captured
capture_lock = threading.Lock()


def empty_cache() -> None:
    """Gives back the device memory that torch's allocator keeps, once nobody captures a graph."""
    with capture_lock:
        torch.cuda.empty_cache()
