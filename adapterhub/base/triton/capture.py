"""Captures a forward as a CUDA graph, on a stream of its own, beside what other threads do on this and other GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adapterhub.swap.gpu import capture_lock

_LOOKS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor  # written anew by each replay


class Capturer:
    """Of one device, whose graphs share memory of their own: they run one at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: Any = None

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        """Torch's own is one for the whole process, on the device that captured first."""
        return torch.cuda.Stream(self._device)

    def let_go(self) -> None:
        """The memory goes with the last of the graphs; others are captured in another."""
        self._memory = None

    def capture(self, forward: Callable[[], torch.Tensor]) -> Captured:
        """`forward` is run twice before. Raises torch.OutOfMemoryError, and RuntimeError when it cannot be captured."""
        torch.cuda.synchronize(self._device)
        with torch.cuda.stream(self._stream):  # where libraries then have the memory that they keep for a stream
            forward()  # compiles the kernels
            with Watch() as watch:
                forward()
        torch.cuda.synchronize(self._device)
        if watch.looked:
            raise RuntimeError(f"the host looks at the device's numbers in every step ({', '.join(watch.looked)})")
        if self._memory is None:
            self._memory = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # copies of other threads, on streams of their own, may go on meanwhile
        capture = torch.cuda.graph(graph, self._memory, self._stream, capture_error_mode="thread_local")
        with capture_lock, _left_in_order(self._device, self._memory), capture:
            logits = forward()
        return Captured(graph, logits)


class Watch(TorchDispatchMode):
    """Notes operations whose result depends on numbers on the device, for which the host has to wait. To try to capture
    one breaks the capture."""

    def __init__(self) -> None:
        super().__init__()
        self.looked: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _looks(func, args):
            self.looked.add(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


def _looks(func: Any, args: Any) -> bool:
    if func is torch.ops.aten.index.Tensor:  # has the tag for the sake of masks
        return any(index is not None and not index.dtype.is_signed for index in args[1])
    return any(tag in func.tags for tag in _LOOKS)


@contextmanager
def _left_in_order(device: torch.device, memory: Any) -> Iterator[None]:
    """After a capture that is broken its stream is still the current one, and torch 2.11's allocator takes it to be
    under way for ever, so that it never gives memory back."""
    stream = torch.cuda.current_stream(device)
    try:
        yield
    except BaseException:
        with suppress(RuntimeError):  # later ones do so themselves, and say that it is not under way
            torch._C._cuda_endAllocateToPool(device.index, memory)
        raise
    finally:
        torch.cuda.set_stream(stream)
