"""A base of the Llama family as the native code sees it: C structures that point into its weights."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from adapterhub.base.kv import KVCache
from adapterhub.base.model import Base
from adapterhub.base.native import library
from adapterhub.base.native.structs import Layer, Matrix, Model, address
from adapterhub.base.quantize import QuantizedWeight

_FAMILY = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
_SITES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def supports(base: Base) -> bool:
    """Whether native code computes what this base's own forward would."""
    config = base.model.config
    return (
        type(base.model).__name__ in _FAMILY
        and base.device.type == "cpu"
        and base.dtype is torch.bfloat16
        and config.hidden_act == "silu"
        and not any(getattr(config, name, False) for name in ("mlp_bias", "attention_bias"))
        and library() is not None
    )


class NativeModel:
    """The structures of one base, and what goes before its first layer."""

    def __init__(self, base: Base, kv: KVCache | None = None) -> None:
        """Without a KV cache the layers can be trained, not served."""
        self._base, self._kv = base, kv
        decoder: Any = base.model.model
        config = base.model.config
        self._embed, self._rotary = decoder.embed_tokens, decoder.rotary_emb
        known = {target.name: i for i, target in enumerate(base.layout.targets)}
        prefix = f"{base.model.base_model_prefix}.layers"
        layers = [
            self._layer(layer, i, [known[f"{prefix}.{i}.{site}"] for site in _SITES])
            for i, layer in enumerate(decoder.layers)
        ]
        self._layers = (Layer * len(layers))(*layers)
        attention = decoder.layers[0].self_attn
        head = base.model.lm_head
        self.vocabulary = _weight(head).shape[0]
        cos, _ = self.angles(torch.zeros(1, dtype=torch.long))
        self.struct = Model(
            layers=self._layers,
            num_layers=len(layers),
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=attention.head_dim,
            intermediate=config.intermediate_size,
            rotary_dim=2 * cos.shape[-1],
            epsilon=config.rms_norm_eps,
            scale=attention.scaling,
            final_norm=address(decoder.norm.weight),
            head=Matrix.of(_weight(head), head.bias),
        )

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden]"""
        return self._embed(tokens)

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [tokens, rotary_dim / 2] in fp32; both halves of a head turn by the same angles."""
        cos, sin = self._rotary(torch.empty(1, dtype=torch.float32), positions.unsqueeze(0))
        half = cos.shape[-1] // 2
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()

    def _layer(self, layer: Any, index: int, targets: list[int]) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        window = getattr(attention, "sliding_window", getattr(self._base.model.config, "sliding_window", None))
        if type(self._base.model).__name__ == "LlamaForCausalLM":
            window = None
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        keys, values = self._kv.layer(index) if self._kv else (None, None)
        return Layer(
            qkv=_merged([attention.q_proj, attention.k_proj, attention.v_proj]),
            output=Matrix.of(_weight(attention.o_proj)),
            gate_up=_merged([mlp.gate_proj, mlp.up_proj]),
            down=Matrix.of(_weight(mlp.down_proj)),
            input_norm=address(layer.input_layernorm.weight),
            mlp_norm=address(layer.post_attention_layernorm.weight),
            q_norm=address(q_norm.weight) if q_norm is not None else None,
            k_norm=address(k_norm.weight) if k_norm is not None else None,
            keys=address(keys) if keys is not None else None,
            values=address(values) if values is not None else None,
            window=window or 0,
            targets=(ctypes.c_int * 7)(*targets),
        )


def _weight(linear: Any) -> torch.Tensor | QuantizedWeight:
    quantized = getattr(linear, "quantized", None)
    return linear.weight if quantized is None else quantized


def _merged(linears: list[Any]) -> Matrix:
    """Linears that read the same input as one. Their weights come to lie in one piece of memory, of which each keeps
    its part: the torch path goes on with the same numbers, and nothing is held twice."""
    bias = None if linears[0].bias is None else _share([linear.bias for linear in linears])
    weights = [_weight(linear) for linear in linears]
    if isinstance(weights[0], QuantizedWeight):
        parts = (_share([getattr(w, name) for w in weights]) for name in ("data", "scales", "minima"))
        return Matrix.of(QuantizedWeight(weights[0].precision, *parts), bias)
    return Matrix.of(_share([linear.weight for linear in linears]), bias)


def _share(parts: list[torch.Tensor]) -> torch.Tensor:
    """One tensor with the parts' rows, which become views of it."""
    whole, at = _joined(parts), 0
    for part in parts:
        part.data = whole[at : at + len(part)]
        at += len(part)
    return whole


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """The parts one after the other; without a copy where they lie like that already."""
    at, memory = parts[0].data_ptr(), parts[0].untyped_storage().data_ptr()
    for part in parts:
        if part.data_ptr() != at or part.untyped_storage().data_ptr() != memory:
            return torch.cat(parts)
        at += part.nbytes
    size = (sum(len(p) for p in parts), *parts[0].shape[1:])
    return parts[0].detach().as_strided(size, parts[0].stride())
