"""Host memory that is read from end to end at every step: one piece of it, on huge pages where the system has them.

With pages of 4 KiB the processor spends a tenth of a decode step looking up where the next one lies.
"""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress
from pathlib import Path

import torch

from adapterhub.swap.cgroup import PROC, ROOT, groups

_MADV_HUGEPAGE = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux
HUGE_PAGE = 2 * 1024**2


def streaming_memory(nbytes: int) -> torch.Tensor:
    """[nbytes] of uint8, uninitialized, starting on a huge page. The system hands out its pages as they are written.

    Raises torch.OutOfMemoryError.
    """
    try:
        whole = torch.empty(nbytes + HUGE_PAGE, dtype=torch.uint8)
    except RuntimeError as error:  # on a CPU torch has no name of its own for it
        raise torch.OutOfMemoryError(str(error)) from error
    skipped = -whole.data_ptr() % HUGE_PAGE
    memory = whole[skipped : skipped + nbytes]
    if _MADV_HUGEPAGE is not None and nbytes >= HUGE_PAGE:
        madvise = ctypes.CDLL(None).madvise
        # an advice: without such pages it works all the same
        madvise(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(nbytes // HUGE_PAGE * HUGE_PAGE), _MADV_HUGEPAGE)
    return memory


def give_back_freed() -> None:
    """To the system, what was freed and malloc keeps for later: after much that is large has come and gone, hundreds of
    MiB. Who allocates meanwhile may wait for milliseconds. Nothing happens where the C library has no word for it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
    if trim is not None:
        trim(ctypes.c_size_t(0))


def available_bytes(proc: Path = PROC, cgroup: Path = ROOT) -> int | None:
    """What this process may still take, by the machine and by its control groups. None where no system says so."""
    found: list[int] = []
    with suppress(OSError):
        lines = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    for group in groups(proc, cgroup):
        with suppress(OSError, ValueError):  # "max" is no number: no limit
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
            found.append(limit - used + int(stat["inactive_file"]))  # cached files give way
    return max(0, min(found)) if found else None
