"""Compiles Triton's kernels for a GPU that need not be there, and prints what they take: `-m tests.compiling 90`.

Each kernel is launched as in serving, on tensors in the host's memory, up to where it would be loaded onto the device.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import JITFunction, driver

from adapterhub.base.triton import attention, lora, tiles
from adapterhub.base.triton.decoding import ROWS
from adapterhub.base.triton.tables import tables_for
from adapterhub.swap.layout import Layout, Target
from tests.kernels import InPool, LearningCase, forward_of, learning_launches

CAPABILITY = int(sys.argv[1])
DTYPE = torch.bfloat16
PTXAS = get_ptxas(CAPABILITY).path  # the one that Triton asks: releases bring several, each with its own PTX version
SHAPES = (  # n_in and widths of q, k, v; key heads, heads that share one, length of a head
    (896, (896, 128, 128), (2, 7, 64)),
    (4096, (4096, 1024, 1024), (8, 4, 128)),
)


class Absent:
    """A driver for a GPU that is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main() -> None:
    launch, found = JITFunction.run, {}

    def compile_only(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = launch(self, *args, warmup=True, **kwargs)
        if kernel.hash not in found:
            shared = kernel.metadata.shared
            found[kernel.hash] = {"name": self.__name__, "shared": shared, **assembled(kernel.asm["ptx"])}

    driver.set_active(Absent())
    JITFunction.run = compile_only
    tiles.in_fp32 = attention.in_fp32 = lambda x: False  # bf16 on a CPU is the interpreter's
    for n_in, widths, (kv_heads, group, dim) in SHAPES:
        layout = Layout(tuple(Target(f"{i}", n_in, width) for i, width in enumerate(widths)))
        for lengths, rank in (([1] * 4, 16), ([100] * 2, 16), ([100] * 2, 64)):
            adapter = InPool(rank, torch.zeros(len(widths), dtype=torch.long), {})
            forward = forward_of(lengths, lengths, [adapter] * len(lengths))
            tables, rows = tables_for(forward, layout, torch.device("cpu")), sum(lengths)
            x, y, pool = (torch.zeros(shape, dtype=DTYPE) for shape in ((rows, n_in), (rows, sum(widths)), (8,)))
            lora.add_lora(y, x, pool, tables, 0, widths)
            if not tables.decoding:
                jobs = tuple((span.rows.start, span.rows.stop) for span in forward.spans)
                case = LearningCase(jobs, (rank,) * len(jobs), n_in, widths, rows)
                for step in learning_launches(case, DTYPE, torch.device("cpu")).values():
                    step()
            cache, new = torch.zeros(64, kv_heads, dim, dtype=DTYPE), torch.zeros(kv_heads, rows, dim, dtype=DTYPE)
            q = torch.zeros(rows, kv_heads * group, dim, dtype=DTYPE).transpose(0, 1)
            attention.write_kv(cache, cache, new, new, tables.slots)
            for window, softcap in ((None, None), (64, 30.0)):
                attention.attend_paged(q, cache, cache, tables, dim**-0.5, window, softcap)
        for rows in ROWS:
            tables = tables_for(forward_of([1] * rows, [1] * rows, [None] * rows), layout, torch.device("cpu"))
            q = torch.zeros(rows, kv_heads * group, dim, dtype=DTYPE).transpose(0, 1)
            attention.attend_paged(q, cache, cache, tables, dim**-0.5)
    print(json.dumps(list(found.values())))


def assembled(ptx: str) -> dict[str, Any]:
    """What the assembler says of a kernel: bytes it spills; whether it loads numbers of 16 or 32 bits one by one."""
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "kernel.ptx"
        source.write_text(ptx)
        name = f"sm_{CAPABILITY}{'a' if CAPABILITY >= 90 else ''}"
        command = [PTXAS, "-v", f"--gpu-name={name}", source, "-o", Path(directory) / "kernel.cubin"]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    [spills] = [line.split("bytes stack frame, ")[1].split()[0] for line in log.splitlines() if "spill stores" in line]
    single, words = ("ld.global.b16" in ptx, "ld.global.b32" in ptx or "cp.async.ca" in ptx)
    return {"spills": int(spills), "single_loads": single, "single_words": words}


if __name__ == "__main__":
    main()
