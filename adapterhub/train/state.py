"""A run's state on disk: a safetensors file with the block, what the optimizer remembers, and where the run is."""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from adapterhub.errors import ServerFault
from adapterhub.swap.block import DTYPE_NAMES
from adapterhub.swap.files import write_durably

_FORMAT = "adapterhub.run.v2"


@dataclass(frozen=True, eq=False)
class RunState:
    """A copy: `tensors` on the CPU, and `facts`, which JSON can say."""

    step: int
    tensors: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def save(self, path: Path) -> None:
        """Synced before it has its name, in place of what has it; takes no memory. Raises StorageFull."""
        write_durably(path, *self._chunks())

    def _chunks(self) -> Iterator[bytes | memoryview]:
        """The file, from the very memory of the tensors."""
        metadata = {"format": _FORMAT, "step": str(self.step), "facts": json.dumps(self.facts)}
        header: dict[str, Any] = {"__metadata__": metadata}
        tensors = sorted(self.tensors.items(), key=lambda named: -named[1].itemsize)  # so that each is aligned
        end = 0
        for name, tensor in tensors:
            begin, end = end, end + tensor.nbytes
            header[name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        yield len(text).to_bytes(8, "little") + text
        for _, tensor in tensors:
            yield memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]

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


class CopyRoom:
    """The memory that states may take while they wait to be written, those of all runs together: so many bytes, or one
    of any size. For any thread."""

    def __init__(self, most: int) -> None:
        self._most, self._taken = most, 0
        self._lock = threading.RLock()  # a state may go while another is taken in

    def admits(self, nbytes: int) -> bool:
        return self._taken == 0 or self._taken + nbytes <= self._most

    def take(self, state: RunState) -> None:
        """Until nobody has it any more."""
        with self._lock:
            self._taken += state.nbytes
        weakref.finalize(state, self._give_back, state.nbytes)

    def _give_back(self, nbytes: int) -> None:
        with self._lock:
            self._taken -= nbytes
