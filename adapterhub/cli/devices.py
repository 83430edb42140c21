"""How the command line shows devices: what the machine says of each, and what runs on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table

from adapterhub.cli.client import table_of
from adapterhub.cli.formats import percent
from adapterhub.config import format_bytes


def devices_table(devices: Iterable[Mapping[str, Any]]) -> Table:
    """A row for each device of a server, as it tells of them."""
    columns = {
        "Device": "device",
        "Running": "running",
        "Waiting": "waiting",
        "Adapters": "adapters",
        "Pool used": "pool",
        "KV used": "kv",
        "Hardware": "hardware",
    }
    rows = [{"device": d["device"], "hardware": told(d["hardware"]), **_load(d)} for d in devices]
    return table_of(rows, columns, right=("Running", "Waiting", "Adapters", "Pool used", "KV used"))


def shortage(engine: Mapping[str, Any]) -> str | None:
    """What lack of memory on the devices has done since the start; None where there was none."""
    steps, pieces = engine["out_of_memory"], engine["training"]["out_of_memory"]
    if not steps and not pieces:
        return None
    line = f"Out of memory: {steps} steps and {pieces} pieces of training were done again with less"
    return f"{line}; requests that failed for it: {engine['refused']}" if engine["refused"] else line


def told(hardware: Mapping[str, Any]) -> str:
    """What is known of a device, on a few lines."""
    lines = [hardware["name"]]
    if hardware["memory_total_bytes"]:
        used, total = hardware["memory_used_bytes"], hardware["memory_total_bytes"]
        lines.append(f"memory {format_bytes(used)} of {format_bytes(total)} used")
    if hardware["pcie_generation"] and hardware["pcie_width"]:
        link = f"PCIe {hardware['pcie_generation']} x{hardware['pcie_width']}"
        most = f"{hardware['pcie_generation_max']} x{hardware['pcie_width_max']}"
        lines.append(f"{link} (at most {most})" if most not in link else link)
    clocks = [
        f"{what} {hardware[f'{field}_mhz']} of {hardware[f'{field}_max_mhz'] or '?'} MHz"
        for what, field in (("SM", "sm_clock"), ("memory", "memory_clock"))
        if hardware[f"{field}_mhz"] is not None
    ]
    if clocks:
        lines.append(", ".join(clocks))
    if hardware["throttling"]:
        lines.append(f"held down by {', '.join(hardware['throttling'])}")
    if hardware["utilization_ratio"] is not None:
        lines.append(f"{percent(hardware['utilization_ratio'])} busy")
    return "\n".join(lines)


def _load(device: Mapping[str, Any]) -> dict[str, Any]:
    if not device["alive"]:
        return {"running": "lost: restart the server"}
    engine, pool = device["engine"], device["tiers"]["device"]
    return {
        "running": engine["running"],
        "waiting": engine["waiting"],
        "adapters": pool["adapters"],
        "pool": f"{format_bytes(pool['used_bytes'])} of {format_bytes(pool['budget_bytes'])}",
        "kv": percent(1 - engine["kv_blocks_free"] / engine["kv_blocks"]),
    }
