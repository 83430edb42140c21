"""A stand-in for `torch.cuda` on a machine without a GPU: streams, events, and captures of graphs, on a clock that the
test turns. Tensors stay in host memory, and what is launched is done at once; that it takes time is for events to say.

It has the rules of torch's allocator: its caches are emptied on all devices at once, not while a graph is captured on
any, and a capture that is broken stays under way until the allocator is told.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

NOT_EMPTY = "captures_underway.empty() INTERNAL ASSERT FAILED"
BROKEN = "CUDA error: operation failed due to a previous error during capture"


class Cuda:
    """Each thread has its own current device, and its own current stream on each."""

    def __init__(self) -> None:
        self.now = 0.0  # ms
        self.under_way: list[tuple[torch.device, object]] = []  # captures, as the allocator knows them, by their memory
        self.captures: list[Stream] = []  # all that were begun
        self.emptied = 0
        self.faults: list[str] = []  # what broke a rule, in whatever thread
        self.breaks = False  # every capture, from now on
        self._own = threading.local()
        self._memories = 0

    def plug_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in (
            "current_device", "set_device", "current_stream", "set_stream", "stream", "synchronize", "empty_cache",
            "graph_pool_handle",
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        for made in (Stream, Event, CUDAGraph):
            monkeypatch.setattr(torch.cuda, made.__name__, type(made.__name__, (made,), {"cuda": self}))
        monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", None)
        monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_allocation, raising=False)

    def current_device(self) -> int:
        return getattr(self._own, "device", 0)

    def set_device(self, device: torch.device | int) -> None:
        self._own.device = device if isinstance(device, int) else device.index

    def current_stream(self, device: torch.device | None = None) -> Stream:
        index = self.current_device() if device is None else device.index
        streams = self._own.__dict__.setdefault("streams", {})
        if index not in streams:
            streams[index] = torch.cuda.Stream(torch.device("cuda", index))
        return streams[index]

    def set_stream(self, stream: Stream) -> None:
        self.set_device(stream.device)
        self.current_stream()
        self._own.streams[stream.device.index] = stream

    def stream(self, stream: Stream) -> Current:
        return Current(self, stream)

    def synchronize(self, device: torch.device | None = None) -> None:
        self.now = max(self.now, self.current_stream(device).free)

    def empty_cache(self) -> None:
        if self.under_way:
            raise self.fault(NOT_EMPTY)
        self.emptied += 1

    def graph_pool_handle(self) -> object:
        self._memories += 1
        return (0, self._memories)

    def end_allocation(self, device: int, memory: object) -> None:
        if (torch.device("cuda", device), memory) not in self.under_way:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.under_way.remove((torch.device("cuda", device), memory))

    def fault(self, message: str) -> RuntimeError:
        self.faults.append(message)
        return RuntimeError(message)


class Stream:
    """What is queued between two events takes `takes` ms."""

    cuda: Cuda

    def __init__(self, device: torch.device | None = None, takes: float = 0.0) -> None:
        self.device = torch.device("cuda", self.cuda.current_device()) if device is None else device
        self.takes = takes
        self.free = 0.0  # when all that is queued is done

    def wait_event(self, event: Event) -> None:
        self.free = max(self.free, event.time)


class Event:
    cuda: Cuda

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.time, self._timed = 0.0, enable_timing

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self.cuda.current_stream()
        stream.free = self.time = max(stream.free, self.cuda.now) + stream.takes

    def query(self) -> bool:
        return self.time <= self.cuda.now

    def synchronize(self) -> None:
        self.cuda.now = max(self.cuda.now, self.time)

    def elapsed_time(self, end: Event) -> float:
        assert self._timed, "an event that was made without timing"
        assert end._timed, "an event that was made without timing"
        assert self.query(), "not recorded yet"
        assert end.query(), "not recorded yet"
        return end.time - self.time


class CUDAGraph:
    cuda: Cuda

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global", **_: Any) -> None:
        assert capture_error_mode == "thread_local", "what other threads do would break it"
        if self.cuda.under_way:
            raise self.cuda.fault("another capture is under way")
        self._stream, self._memory = self.cuda.current_stream(), pool
        self.cuda.captures.append(self._stream)
        self.cuda.under_way.append((self._stream.device, pool))

    def capture_end(self) -> None:
        assert self.cuda.current_stream() is self._stream
        if self.cuda.breaks:
            raise RuntimeError(BROKEN)
        self.cuda.under_way.remove((self._stream.device, self._memory))

    def replay(self) -> None:
        """What was captured was done at the capture."""


class Current:
    def __init__(self, cuda: Cuda, stream: Stream) -> None:
        self._cuda, self._stream = cuda, stream

    def __enter__(self) -> None:
        self._before = self._cuda.current_stream()
        self._cuda.set_stream(self._stream)

    def __exit__(self, *_: object) -> None:
        self._cuda.set_stream(self._before)
