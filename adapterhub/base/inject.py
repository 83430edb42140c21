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
from adapterhub.swap.layout import Layout, Target


class MultiplexedLinear(nn.Module):
    """A linear of the base plus, for each segment of the running batch, its adapter's delta."""

    def __init__(self, linear: nn.Linear, target: str, number: int, slot: Slot) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.target, self.number = target, number
        self.slot = slot

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.linear(x, self.weight, self.bias)
        batch = self.slot.batch
        if batch is None or not batch.segments:
            return y
        flat, rows = y.view(-1, self.out_features), x.reshape(-1, self.in_features)
        return add_lora(flat, rows, batch, self.target, self.number).view(y.shape)


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
