"""The host tier's memory, in one piece: what RAM keeps lies in the first part, what only passes through in the second.

A GPU copies straight from it where it is page-locked. torch's own page-locked memory would come in powers of two; this
is registered as it is, whatever its size. That takes a moment, in a thread of its own; until then, and where the system
refuses, a copy takes longer and is right all the same.
"""

from __future__ import annotations

import logging
import threading

import torch

from adapterhub.config import format_bytes
from adapterhub.errors import BadRequest
from adapterhub.swap.allocator import ExtentAllocator
from adapterhub.swap.memory import available_bytes, streaming_memory

log = logging.getLogger(__name__)


class Arena:
    """`capacity` bytes that RAM keeps blocks in, and `staging` bytes for others on their way to `device`. Where blocks
    lie in the first part is decided elsewhere (`residency.py`). Only the engine's thread may call this."""

    def __init__(self, capacity: int, staging: int, dtype: torch.dtype, device: torch.device) -> None:
        """Raises BadRequest when there is no such memory."""
        self.dtype = dtype
        self.capacity = ExtentAllocator(capacity).capacity
        self._staging = ExtentAllocator(staging)
        nbytes = self.capacity + self._staging.capacity
        locks = device.type == "cuda" and nbytes > 0
        available = available_bytes() if locks else None  # elsewhere pages are taken as blocks come
        try:
            if available is not None and nbytes > available:
                raise torch.OutOfMemoryError(f"{format_bytes(available)} are left")
            self._memory = streaming_memory(nbytes)
        except torch.OutOfMemoryError as error:
            raise BadRequest(
                f"A RAM tier of {format_bytes(capacity)} is more host memory than the system gives ({error}). Choose "
                "less (--ram-bytes)."
            ) from error
        self._locked = _PageLocked(self._memory, device) if locks else None

    @property
    def is_locked(self) -> bool:
        """Whether a device reads it by itself, so that who begins a copy is not held up; of a CPU, always."""
        return self._locked is None or self._locked.done

    def view(self, start: int, nbytes: int) -> torch.Tensor:
        """A block of so many bytes that begins at byte `start`, flat [nbytes / itemsize]."""
        return self._memory[start : start + nbytes].view(self.dtype)

    def stage(self, nbytes: int) -> int | None:
        """Where a block that RAM does not keep may lie until it has been copied on; None when there is no room."""
        start = self._staging.allocate(nbytes)
        return None if start is None else self.capacity + start

    def unstage(self, start: int) -> None:
        self._staging.release(start - self.capacity)

    @property
    def staged_bytes(self) -> int:
        return self._staging.used_bytes

    def close(self) -> None:
        """No copy from it may be under way."""
        if self._locked is not None:
            self._locked.release()


class _PageLocked:
    """Keeps `memory` where it is, so that a GPU may read it by itself."""

    def __init__(self, memory: torch.Tensor, device: torch.device) -> None:
        self._memory, self._device = memory, device
        self.done = False
        self._thread = threading.Thread(target=self._lock, name="adapterhub-pin", daemon=True)
        self._thread.start()

    def release(self) -> None:
        self._thread.join()
        if self.done:
            with torch.cuda.device(self._device):
                error = torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
            if error != torch.cuda.cudart().cudaError.success:
                log.warning("The RAM tier's memory stays page-locked: CUDA error %d.", int(error))

    def _lock(self) -> None:
        try:
            with torch.cuda.device(self._device):
                cudart = torch.cuda.cudart()
                error = cudart.cudaHostRegister(self._memory.data_ptr(), self._memory.nbytes, 0)
                if error != cudart.cudaError.success:
                    raise RuntimeError(cudart.cudaGetErrorString(error))
            self.done = True
        except RuntimeError as error:
            log.warning(
                "The RAM tier's %s cannot be page-locked, so that copies to %s take longer: %s",
                format_bytes(self._memory.nbytes),
                self._device,
                error,
            )
