"""How blocks get from host memory into the pool: on a CPU at once, on a GPU on a stream of their own, so that nobody
waits for a copy but who uses the block, and a copy waits for those alone that may still use what lay there before."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch


class Copy(Protocol):
    """One that is under way, or has ended."""

    def done(self) -> bool: ...

    def wait(self) -> None:
        """Until it has ended; for any thread."""

    def join(self) -> None:
        """What the engine's thread queues from now on finds the block there, although the copy may not have ended."""

    @property
    def ms(self) -> float:
        """From when it was begun until it had ended, in milliseconds. Waits for that; for the engine's thread."""


@dataclass(frozen=True)
class Ended:
    """A copy that has ended."""

    ms: float = 0.0

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        pass

    def join(self) -> None:
        pass


class Loaded(NamedTuple):
    """How a block came to the device."""

    read_ms: float  # from when it was asked for until its copy was begun
    copy: Copy

    @property
    def ms(self) -> float:
        """From when it was asked for until it was there. Waits for that; for the engine's thread."""
        return self.read_ms + self.copy.ms


class Copies:
    """Within host memory: a copy has ended when `start` returns."""

    queues = False  # `start` takes no time: it only queues the copy
    staging_bytes = 0  # of host memory, for blocks that are on their way and that RAM does not keep

    def mark(self) -> object:
        """What the device has been given to do by now. For the engine's thread."""
        return None

    def start(self, target: torch.Tensor, source: torch.Tensor, after: object) -> Copy:
        """Copies a block, on any thread, after what `mark` told of. The source must stay until it has ended."""
        begun = time.perf_counter()
        target.copy_(source)
        return Ended((time.perf_counter() - begun) * 1e3)


class StreamCopies(Copies):
    """To one GPU. From page-locked memory, each is one transfer beside everything else that the GPU does."""

    queues = True
    staging_bytes = 128 * 1024**2

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._idle = torch.cuda.Stream(device)  # nothing is queued here, so that an event is recorded at once

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def start(self, target: torch.Tensor, source: torch.Tensor, after: object) -> Copy:
        assert isinstance(after, torch.cuda.Event)
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True, blocking=True)  # who waits for it leaves the core to others
        with torch.cuda.stream(self._stream):
            begin.record(self._idle)
            self._stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            end.record(self._stream)
        return _StreamCopy(begin, end, self._device)


class _StreamCopy:
    def __init__(self, begin: torch.cuda.Event, end: torch.cuda.Event, device: torch.device) -> None:
        self._begin, self._end, self._device = begin, end, device

    def done(self) -> bool:
        return self._end.query()

    def wait(self) -> None:
        self._end.synchronize()

    def join(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._end)

    @property
    def ms(self) -> float:
        self._begin.synchronize()
        self.wait()
        return self._begin.elapsed_time(self._end)


def copies_to(device: torch.device) -> Copies:
    return StreamCopies(device) if device.type == "cuda" else Copies()
