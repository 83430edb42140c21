"""A GPU as NVML knows it (`pip install 'adapterhub[nvml]'`)."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch

from adapterhub.swap.gpu import empty_cache

log = logging.getLogger(__name__)


class Gpu(NamedTuple):
    """NVML's module, and what it calls the device."""

    nvml: Any
    handle: Any


def gpu_of(device: torch.device) -> Gpu | None:
    """None where NVML is not there or does not know the device, as for a part of a GPU, or within a container."""
    try:
        import pynvml
    except ImportError:
        log.info("little is known of %s: more needs `pip install 'adapterhub[nvml]'`", device)
        return None
    try:
        pynvml.nvmlInit()
        return Gpu(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}"))
    except pynvml.NVMLError as error:
        log.warning("little is known of %s: %s", device, error)
        return None


def free_bytes(device: torch.device) -> int:
    """What no program has taken of a GPU's memory, this process's own caches being emptied first: by NVML and by CUDA,
    whichever says less."""
    empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    if (gpu := gpu_of(device)) is not None:
        try:
            free = min(free, gpu.nvml.nvmlDeviceGetMemoryInfo(gpu.handle).free)
        except gpu.nvml.NVMLError as error:
            log.warning("NVML does not say how much memory of %s is free: %s", device, error)
    return free
