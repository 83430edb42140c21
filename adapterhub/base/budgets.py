"""How much memory of the device and of the host an engine may use for what."""

from __future__ import annotations

from typing import NamedTuple

import torch

from adapterhub.config import MIB, Config


class Budgets(NamedTuple):
    """Bytes."""

    device: int  # the pool of adapters
    ram: int  # the tier of adapters in RAM
    kv: int  # the KV cache

    @classmethod
    def of(cls, config: Config, device: torch.device) -> Budgets:
        """The sizes that were given, and for the others what suits the device."""
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            chosen = cls(free // 4, 2048 * MIB, free // 2)
        else:
            chosen = cls(512 * MIB, 0, 256 * MIB)
        given = (config.device_bytes, config.ram_bytes, config.kv_bytes)
        return cls(*(c if g is None else g for c, g in zip(chosen, given, strict=True)))
