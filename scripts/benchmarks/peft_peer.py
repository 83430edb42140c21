"""PEFT's mixed batch: `adapter_names` in one `generate`."""

from __future__ import annotations

import time
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.process import Library, Times, answer_orders


class Peft(Library):
    def __init__(self, base: str) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
        self._count = 0

    def load(self, path: str) -> float:
        started = time.perf_counter()
        name = str(self._count)
        if self._count:
            self._model.load_adapter(path, adapter_name=name)
        else:
            self._model = PeftModel.from_pretrained(self._model, path, adapter_name=name).eval()
        self._count += 1
        return time.perf_counter() - started

    def unload(self) -> None:
        self._count -= 1
        self._model.delete_adapter(str(self._count))

    def ask(self, prompt: list[int], adapters: list[int | None], tokens: int) -> list[Times]:
        began = time.perf_counter()
        ends: list[float] = []

        def note(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            ends.append(time.perf_counter() - began)
            return torch.zeros(len(ids), dtype=torch.bool)

        names = ["__base__" if adapter is None else str(adapter) for adapter in adapters]
        ids = torch.tensor([prompt] * len(names))
        lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        options = {"do_sample": False, "pad_token_id": 2, "stopping_criteria": [note], "adapter_names": names}
        with torch.no_grad():
            self._model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **lengths, **options)
        return [Times(ends[0], time.perf_counter() - began)] * len(names)


if __name__ == "__main__":
    answer_orders(Peft)
