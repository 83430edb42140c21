"""What the machine says of the devices that a server runs on: of GPUs through NVML (`pip install 'adapterhub[nvml]'`),
else what is known without it."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from prometheus_client.core import GaugeMetricFamily, Metric

from adapterhub.base.nvml import gpu_of
from adapterhub.swap.memory import available_bytes

# NVML's bits of why clocks are lower than they could be; that nothing runs is no such reason
THROTTLING = {
    0x2: "application_clocks",
    0x4: "power_cap",
    0x8: "hardware_slowdown",
    0x10: "sync_boost",
    0x20: "software_thermal",
    0x40: "hardware_thermal",
    0x80: "power_brake",
    0x100: "display_clocks",
    0x200: "board_limit",
    0x400: "reliability",
}


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A device at one moment; None is what nobody says. Memory is all programs'; of a CPU, used is what this process
    may not take."""

    name: str
    memory_total_bytes: int | None = None
    memory_used_bytes: int | None = None
    pcie_generation: int | None = None  # as the link is now: it may be slower while nothing is copied
    pcie_generation_max: int | None = None
    pcie_width: int | None = None  # lanes
    pcie_width_max: int | None = None
    sm_clock_mhz: int | None = None
    sm_clock_max_mhz: int | None = None
    memory_clock_mhz: int | None = None
    memory_clock_max_mhz: int | None = None
    throttling: tuple[str, ...] | None = None  # why clocks are held down, of `THROTTLING`
    utilization_ratio: float | None = None  # of the last second, the part in which a kernel ran

    @property
    def json(self) -> dict[str, Any]:
        return asdict(self)


class Devices:
    """The devices of a server by their names. Safe to use from any thread."""

    def __init__(self, devices: Mapping[str, torch.device]) -> None:
        self._looks = {name: _look_at(device) for name, device in devices.items()}

    def look(self) -> dict[str, Hardware]:
        """All of them, now."""
        return {name: look() for name, look in self._looks.items()}

    def collect(self) -> Iterator[Metric]:
        """A `device` label has the names alone."""
        seen = self.look()
        for name, text, field, scale in (
            ("memory_total_bytes", "Of the device.", "memory_total_bytes", 1),
            ("memory_used_bytes", "By all programs.", "memory_used_bytes", 1),
            ("utilization_ratio", "Of the last second, the part in which a kernel ran.", "utilization_ratio", 1),
            ("pcie_generation", "Of its link as it is now.", "pcie_generation", 1),
            ("pcie_width", "Lanes of its link as it is now.", "pcie_width", 1),
            ("sm_clock_hertz", "Of its processors.", "sm_clock_mhz", 1e6),
            ("memory_clock_hertz", "Of its memory.", "memory_clock_mhz", 1e6),
        ):
            values = {device: getattr(hardware, field) for device, hardware in seen.items()}
            family = GaugeMetricFamily(f"adapterhub:device_{name}", text, labels=["device"])
            for device, value in values.items():
                if value is not None:
                    family.add_metric([device], value * scale)
            if family.samples:
                yield family
        held = GaugeMetricFamily(
            "adapterhub:device_throttled", "Whether its clocks are held down, by why.", labels=["device", "reason"]
        )
        for device, hardware in seen.items():
            if hardware.throttling is not None:
                for reason in THROTTLING.values():
                    held.add_metric([device, reason], reason in hardware.throttling)
        if held.samples:
            yield held


def of_machine() -> Devices:
    """All devices that a server could run on: its GPUs, or its CPU if it has none."""
    count = torch.cuda.device_count()
    names = [f"cuda:{index}" for index in range(count)] or ["cpu"]
    return Devices({name: torch.device(name) for name in names})


def of_nvml(nvml: Any, handle: Any) -> Hardware:
    """What NVML says; each thing by itself, as parts of a GPU and containers do not tell all of it."""

    def ask(question: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return question(handle, *arguments)
        except nvml.NVMLError:
            return None

    memory, busy = ask(nvml.nvmlDeviceGetMemoryInfo), ask(nvml.nvmlDeviceGetUtilizationRates)
    held = ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons)
    return Hardware(
        name=ask(nvml.nvmlDeviceGetName) or "GPU",
        memory_total_bytes=memory and memory.total,
        memory_used_bytes=memory and memory.used,
        pcie_generation=ask(nvml.nvmlDeviceGetCurrPcieLinkGeneration),
        pcie_generation_max=ask(nvml.nvmlDeviceGetMaxPcieLinkGeneration),
        pcie_width=ask(nvml.nvmlDeviceGetCurrPcieLinkWidth),
        pcie_width_max=ask(nvml.nvmlDeviceGetMaxPcieLinkWidth),
        sm_clock_mhz=ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
        sm_clock_max_mhz=ask(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM),
        memory_clock_mhz=ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
        memory_clock_max_mhz=ask(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_MEM),
        throttling=None if held is None else tuple(why for bit, why in THROTTLING.items() if held & bit),
        utilization_ratio=None if busy is None else busy.gpu / 100,
    )


def _look_at(device: torch.device) -> Callable[[], Hardware]:
    if device.type != "cuda":
        name = _processor()
        return lambda: _of_cpu(name)
    gpu = gpu_of(device)
    return (lambda: _of_torch(device)) if gpu is None else (lambda: of_nvml(*gpu))


def _of_torch(device: torch.device) -> Hardware:
    name = torch.cuda.get_device_name(device)
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError:  # it is lost
        return Hardware(name=name)
    return Hardware(name=name, memory_total_bytes=total, memory_used_bytes=total - free)


def _of_cpu(name: str) -> Hardware:
    available = available_bytes()
    if available is None:
        return Hardware(name=name)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware(name=name, memory_total_bytes=total, memory_used_bytes=max(0, total - available))


def _processor() -> str:
    """What the system calls it, and how many cores there are."""
    name = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{name}, {os.cpu_count()} cores"
