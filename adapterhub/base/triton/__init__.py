"""Triton kernels for the LoRA op and for attention over the paged KV cache, and decode steps in buffers that stay.

`tables.py` is what the kernels of a step look up, made once for all layers; a batch that has it goes to the kernels.
`lora.py` and `attention.py` import triton, which comes with torch where that is built for CUDA; nothing else here does.
In Triton's interpreter (TRITON_INTERPRET=1 before triton is imported) they run on a CPU, which is how they are tested.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch


@cache
def usable(device: torch.device) -> bool:
    """Whether a base on `device` is served by these kernels."""
    return device.type == "cuda" and find_spec("triton") is not None
