"""Makes a transformers model serve many adapters: its linears become multiplexed, in place, and attention is ours.

The module tree, the parameters and their names stay as they were; nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from adapterhub.base.attention import ATTENTION, attend
from adapterhub.base.batch import Slot
from adapterhub.base.lora import add_lora
from adapterhub.base.quantize import (
    Precision,
    QuantizedLinear,
    QuantizedWeight,
    can_quantize,
    quantize,
    quantized_product,
)
from adapterhub.swap.layout import Layout, Target


class MultiplexedLinear(nn.Module):
    """A linear of the base plus, for each segment of the running batch, its adapter's delta."""

    def __init__(self, linear: nn.Linear, target: str, number: int, slot: Slot) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.target, self.number = target, number
        self.slot = slot
        self.quantized: QuantizedWeight | None = None  # instead of `weight`, once `quantize` was called

    def quantize(self, precision: Precision) -> None:
        """From now on the base's weight is kept in fewer bits; the original is dropped."""
        if can_quantize(self.weight):
            self.quantized = quantize(self.weight, precision)
            del self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        if self.quantized is not None:
            y = quantized_product(rows, self.quantized, self.bias)
        else:
            y = nn.functional.linear(rows, self.weight, self.bias)
        batch = self.slot.batch
        if batch is not None and batch.segments:
            y = add_lora(y, rows, batch, self.target, self.number)
        return y.view(*x.shape[:-1], self.out_features)


def take_over_attention(model: PreTrainedModel) -> Slot:
    """From now on the model's attention layers compute ours, for the batch in the slot that is returned."""
    slot = Slot()
    AttentionInterface.register(ATTENTION, attend)
    model.set_attn_implementation(ATTENTION)
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.adapterhub_slot = slot
    return slot


def multiplex(model: PreTrainedModel, names: Iterable[str], slot: Slot) -> Layout:
    """Makes the linears `names` take per-segment deltas; returns their layout, in the model's order."""
    targets = []
    for number, name in enumerate(names):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, MultiplexedLinear(linear, name, number, slot))
        targets.append(Target(name, linear.in_features, linear.out_features))
    return Layout(tuple(targets))


def quantize_linears(model: PreTrainedModel, precision: Precision) -> None:
    """Quantizes the multiplexed linears and the output embedding, in place. The output embedding keeps 8 bits, since it
    costs more in quality than it weighs; the input embedding, where rows are only looked up, stays as it is."""
    for module in model.modules():
        if isinstance(module, MultiplexedLinear):
            module.quantize(precision)
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear) and can_quantize(head.weight):
        model.set_output_embeddings(QuantizedLinear(quantize(head.weight, Precision.INT8), head.bias))
