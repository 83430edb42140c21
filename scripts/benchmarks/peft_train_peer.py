"""PEFT's training, as transformers' trainer does it in bf16: factors in fp32, products in bf16 by autocast."""

from __future__ import annotations

import itertools
import tempfile
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.process import Library, Training, answer_orders

_RANK = 16
_NOT_LEARNED = -100


class Peft(Library):
    def __init__(self, base: str) -> None:
        self._base: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)

    def train(self, examples: list[list[int]], prompt: int, batch: int, steps: int) -> Training:
        """Examples of one length, in order and again from the beginning."""
        began = time.perf_counter()
        config = LoraConfig(r=_RANK, lora_alpha=2 * _RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        model: Any = get_peft_model(self._base, config).train()
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=2e-4, weight_decay=0.0, fused=True)
        order = itertools.cycle(examples)
        seconds = []
        for _ in range(steps):
            started = time.perf_counter()
            ids = torch.tensor(list(itertools.islice(order, batch)))
            labels = ids.clone()
            labels[:, :prompt] = _NOT_LEARNED
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - started)
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
        self._base = model.unload()
        return Training(time.perf_counter() - began, seconds)


if __name__ == "__main__":
    answer_orders(Peft)
