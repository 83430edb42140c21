"""PEFT's mixed batch (`adapter_names` in one `generate`), as `peers.py` runs it: takes JSON, prints JSON."""

from __future__ import annotations

import json
import sys
import time

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

order = json.loads(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(order["base"])
base = AutoModelForCausalLM.from_pretrained(order["base"], dtype=torch.bfloat16)
model = PeftModel.from_pretrained(base, order["paths"][0], adapter_name="0")
for index, path in enumerate(order["paths"][1:], start=1):
    model.load_adapter(path, adapter_name=str(index))
model.eval()
rates: dict[int, list[float]] = {}
for streams in order["streams"]:
    batch = tokenizer([order["prompt"]] * streams, return_tensors="pt")
    options = {"max_new_tokens": order["tokens"], "min_new_tokens": order["tokens"], "do_sample": False}
    for _ in range(order["rounds"]):
        started = time.perf_counter()
        with torch.no_grad():
            model.generate(**batch, **options, pad_token_id=2, adapter_names=[str(i) for i in range(streams)])
        rates.setdefault(streams, []).append(streams * order["tokens"] / (time.perf_counter() - started))
print(json.dumps(rates))
