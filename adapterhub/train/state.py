"""A run's state on disk: a safetensors file with the block, what the optimizer remembers, and where the run is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from adapterhub.errors import ServerFault
from adapterhub.swap.files import write_durably

_FORMAT = "adapterhub.run.v1"


@dataclass(frozen=True)
class RunState:
    """A copy: `tensors` on the CPU, and `facts`, which JSON can say."""

    step: int
    tensors: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any]

    def save(self, path: Path) -> None:
        """Synced before it has its name, in place of what has it. Raises StorageFull."""
        metadata = {"format": _FORMAT, "step": str(self.step), "facts": json.dumps(self.facts)}
        write_durably(path, save(dict(self.tensors), metadata))

    @classmethod
    def load(cls, path: Path) -> RunState:
        """Raises FileNotFoundError, or ServerFault when the file is not whole."""
        raw = path.read_bytes()
        try:
            header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
            if header["format"] != _FORMAT:
                raise ValueError(f"its format is {header['format']!r}, not {_FORMAT!r}")
            return cls(int(header["step"]), load(raw), json.loads(header["facts"]))
        except (SafetensorError, ValueError, LookupError, TypeError) as error:
            raise ServerFault(
                f"The saved state {path.parent.name}/{path.name} of a training is damaged ({error}).",
                code="training_state_damaged",
            ) from error
