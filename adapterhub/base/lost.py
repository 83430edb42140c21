"""What an error says of a device: that it is lost, for after some errors of a GPU nothing runs on it any more until the
process is started again; or that it had no memory left, and is well."""

from __future__ import annotations

import torch

from adapterhub.errors import Unavailable

# in the words of torch's allocator on a CPU, of the CUDA driver, and of cuBLAS, which have no class of their own for it
_NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "[CUDA]: out of memory", "STATUS_ALLOC_FAILED")


class DeviceLost(BaseException):
    """No Exception, so that nobody who goes on after errors goes on after this one: the engine's thread ends."""


def check_device(device: torch.device) -> None:
    """Raises DeviceLost unless the device still works, after something on it has failed."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        if not out_of_memory(error):  # which says that it is at work
            raise DeviceLost(f"{device}: {error}") from error


def out_of_memory(error: BaseException) -> bool:
    """Whether less would have fitted. Looks at what came before the error too: a capture that ran out of memory ends
    with an error of its own."""
    known: BaseException | None = error
    while known is not None:
        if isinstance(known, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(known, RuntimeError) and any(words in str(known) for words in _NO_MEMORY):
            return True
        known = known.__cause__ or known.__context__
    return False


def told_briefly(error: BaseException) -> str:
    """What an error of the device says itself; not what follows of other programs, and of how to look for its cause."""
    return ". ".join(str(error).partition("\n")[0].split(". ")[:2])


def device_failed(device: torch.device) -> Unavailable:
    """What the requests of a lost device are told."""
    return Unavailable(
        f"The device {device} that was to answer this has failed. Ask again; if no other answers, the "
        "server needs a restart."
    )
