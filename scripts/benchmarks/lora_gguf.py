"""A PEFT adapter for a model of the Llama family as llama.cpp reads it: a GGUF file of its A and B."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from gguf import GGUFType, GGUFWriter, Keys
from safetensors.torch import load_file

_NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


class Heads(NamedTuple):
    """How many a base's attention has."""

    query: int
    key: int


def write_lora(directory: Path, heads: Heads, out: Path) -> None:
    """`directory` is as PEFT saves an adapter. In 16 bits, like every other contender's."""
    alpha = json.loads((directory / "adapter_config.json").read_text())["lora_alpha"]
    writer = GGUFWriter(out, "llama")
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, float(alpha))
    for name, tensor in load_file(directory / "adapter_model.safetensors").items():
        found = re.search(r"layers\.(\d+)\.\w+\.(\w+)\.lora_([AB])\.weight", name)
        if found is None:
            raise SystemExit(f"{name} has no place in a model of llama.cpp")
        layer, site, part = found.groups()
        if part == "B" and site in ("q_proj", "k_proj"):
            tensor = _interleaved(tensor, heads.query if site == "q_proj" else heads.key)
        numbers = tensor.float().numpy().astype(np.float16)
        writer.add_tensor(f"blk.{layer}.{_NAMES[site]}.weight.lora_{part.lower()}", numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbouring numbers of a head, transformers those of its two halves."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape).contiguous()
