"""A GPU's memory and utilisation, from NVML where there is one (`pip install 'adapterhub[nvml]'`)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from prometheus_client.core import GaugeMetricFamily, Metric

log = logging.getLogger(__name__)


class Devices:
    """`device` as torch writes it. On a CPU there is nothing to tell."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._nvml: Any = None
        self._handle: Any = None
        if device.startswith("cuda"):
            self._open()

    def collect(self) -> Iterator[Metric]:
        if self._nvml is None:
            return
        memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        busy = self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu / 100
        for name, text, value in (
            ("memory_total_bytes", "Of the device.", memory.total),
            ("memory_used_bytes", "By all programs.", memory.used),
            ("utilization_ratio", "Of the last second, the part in which a kernel ran.", busy),
        ):
            family = GaugeMetricFamily(f"adapterhub:device_{name}", text, labels=["device"])
            family.add_metric([self._device], value)
            yield family

    def _open(self) -> None:
        try:
            import pynvml
        except ImportError:
            log.info("no metrics of %s: they need `pip install 'adapterhub[nvml]'`", self._device)
            return
        try:
            pynvml.nvmlInit()
            identity = torch.cuda.get_device_properties(torch.device(self._device)).uuid
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{identity}")
            pynvml.nvmlDeviceGetUtilizationRates(self._handle)
            self._nvml = pynvml
        except pynvml.NVMLError as error:  # as for a part of a GPU, or within a container
            log.warning("no metrics of %s: %s", self._device, error)
