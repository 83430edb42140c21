"""Host memory that is read from end to end at every step: one piece of it, on huge pages where the system has them.

With pages of 4 KiB the processor spends a tenth of a decode step looking up where the next one lies.
"""

from __future__ import annotations

import ctypes
import mmap

import torch

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
