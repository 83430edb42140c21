"""llama.cpp, through llama-cpp-python. Requests with different adapters cannot share a batch, so it does one after the
other; the adapters are loaded beforehand, and a request selects its own.

On processors with AMX a llama-cpp-python that GCC 12 compiled ends in a segmentation fault at the first token: that
compiler's `_tile_loadconfig` tells the optimizer of 8 of the 64 bytes which it reads. Compile it with another.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import llama_cpp
from llama_cpp import Llama

from benchmarks.lora_gguf import Heads, write_lora
from benchmarks.process import Library, Times, answer_orders

CONTEXT = 2048


class LlamaCpp(Library):
    def __init__(self, gguf: str) -> None:
        threads = os.cpu_count()
        self._model = Llama(gguf, n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False)
        fields = self._model.metadata
        heads = (int(fields[f"llama.attention.{name}"]) for name in ("head_count", "head_count_kv"))
        self._heads = Heads(*heads)
        self._adapters: list[Any] = []

    def load(self, path: str) -> float:
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "adapter.gguf"
            write_lora(Path(path), self._heads, file)
            started = time.perf_counter()
            adapter = llama_cpp.llama_adapter_lora_init(self._model.model, str(file).encode())
            seconds = time.perf_counter() - started
        if adapter is None:
            raise SystemExit(f"llama.cpp does not load the adapter {path}")
        self._adapters.append(adapter)
        return seconds

    def unload(self) -> None:
        self._adapters.pop()  # not freed: the context's last graph may still point into it

    def ask(self, prompt: list[int], adapters: list[int | None], tokens: int) -> list[Times]:
        began = time.perf_counter()
        times = []
        for adapter in adapters:
            self._select([] if adapter is None else [self._adapters[adapter]])
            self._model.reset()
            first = 0.0
            for _ in islice(self._model.generate(prompt, temp=0.0, repeat_penalty=1.0), tokens):
                first = first or time.perf_counter() - began
            times.append(Times(first, time.perf_counter() - began))
        return times

    def _select(self, adapters: list[Any]) -> None:
        count = len(adapters)
        handles, scales = (
            (llama_cpp.llama_adapter_lora_p_ctypes * count)(*adapters),
            (ctypes.c_float * count)(*[1.0] * count),
        )
        if llama_cpp.llama_set_adapters_lora(self._model.ctx, handles, count, scales):
            raise SystemExit("llama.cpp does not take the adapter")


if __name__ == "__main__":
    answer_orders(LlamaCpp)
