"""Makes a transformers model serve many adapters: its linears become multiplexed, in place, and attention is ours.

The module tree, the parameters and their names stay as they were; nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from adapterhub.base.attention import ATTENTION, attend
from adapterhub.base.batch import Batch, Batches, Slot
from adapterhub.base.lora import add_lora, add_lora_together
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

    def __init__(self, linear: nn.Linear, target: str, number: int, slot: Batches) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.target, self.number = target, number
        self.slot = slot
        self.quantized: QuantizedWeight | None = None  # instead of `weight`, once `quantize` was called
        self.together: Together | None = None  # with those that read the same input, once they are merged

    def quantize(self, precision: Precision) -> None:
        """From now on the base's weight is kept in fewer bits; the original is dropped."""
        if can_quantize(self.weight):
            self.quantized = quantize(self.weight, precision)
            del self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch = self.slot.batch_of(x.numel() // self.in_features)
        if self.together is not None and batch is not None and batch.tables is not None:
            return self.together.output(self.number, x, batch)
        rows = x.reshape(-1, self.in_features)
        if self.quantized is not None:
            y = quantized_product(rows, self.quantized, self.bias)
        else:
            y = nn.functional.linear(rows, self.weight, self.bias)
        if batch is not None and batch.segments:
            y = add_lora(y, rows, batch, self.target, self.number)
        return y.view(*x.shape[:-1], self.out_features)


class Together:
    """Linears that read the same input one after the other (q, k, v; gate, up), where Triton's kernels serve: the first
    that is called computes for all, in one product and one LoRA op, and the others take what is theirs.

    Their weights come to lie in one piece of memory, of which each keeps its part: nothing is held twice.
    """

    def __init__(self, members: list[MultiplexedLinear]) -> None:
        self._first, self._count = members[0].number, len(members)
        self._widths = tuple(member.out_features for member in members)
        self._weight = torch.cat([member.weight.detach() for member in members])
        for member, part in zip(members, self._weight.split(self._widths), strict=True):
            member.weight.data = part
            member.together = self
        self._bias = None if members[0].bias is None else torch.cat([member.bias.detach() for member in members])

    def output(self, number: int, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """x [.., n_in] -> [.., n_out] of the base's linear `number`, a view. What is computed for the others is in
        the batch, with the input that it is of: a training forward may give way to another before they ask."""
        of, found = batch.computed.pop(number, (None, x))
        if of is not x:
            rows = x.reshape(-1, x.shape[-1])
            y = nn.functional.linear(rows, self._weight, self._bias)
            if batch.segments:
                y = add_lora_together(y, rows, batch, self._first, self._widths)
            parts = y.view(*x.shape[:-1], -1).split(self._widths, -1)
            batch.computed.update((other, (x, part)) for other, part in enumerate(parts, self._first))
            _, found = batch.computed.pop(number)
        return found


def take_over_attention(model: PreTrainedModel) -> Slot:
    """From now on the model's attention layers compute ours, for the batch in the slot that is returned."""
    slot = Slot()
    AttentionInterface.register(ATTENTION, attend)
    model.set_attn_implementation(ATTENTION)
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.adapterhub_slot = slot
    return slot


def inputs_of_linears(
    model: nn.Module, reads: Callable[[nn.Linear, torch.Tensor], bool], forward: Callable[[], object]
) -> dict[str, list[torch.Tensor]]:
    """Runs `forward`, a short one of the model, to see what its linears read; those are left out that never read what
    `reads` is true of. By name, in the model's order."""
    inputs: dict[str, list[torch.Tensor]] = {}
    hooks = []

    def note(name: str) -> Any:
        def hook(module: nn.Linear, args: tuple[torch.Tensor, ...]) -> None:
            if reads(module, args[0]):
                inputs.setdefault(name, []).append(args[0])

        return hook

    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            hooks.append(module.register_forward_pre_hook(note(name)))
    with torch.no_grad():
        forward()
    for hook in hooks:
        hook.remove()
    return {name: inputs[name] for name, _ in model.named_modules() if name in inputs}


def groups_of(inputs: Mapping[str, list[torch.Tensor]]) -> list[list[str]]:
    """Runs of neighbours that were called once, with the very same tensor."""
    groups: list[list[str]] = []
    for before, name in pairwise(inputs):
        if len(inputs[before]) == len(inputs[name]) == 1 and inputs[before][0] is inputs[name][0]:
            if groups and groups[-1][-1] == before:
                groups[-1].append(name)
            else:
                groups.append([before, name])
    return groups


def multiplex(model: nn.Module, names: Iterable[str], slot: Batches) -> Layout:
    """Makes the linears `names` take the deltas of the segments that `slot` leads to; returns their layout, in the
    model's order."""
    targets = []
    for number, name in enumerate(names):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, MultiplexedLinear(linear, name, number, slot))
        targets.append(Target(name, linear.in_features, linear.out_features))
    return Layout(tuple(targets))


def merge(model: nn.Module, groups: Iterable[Iterable[str]]) -> None:
    """From now on the linears of each group, which read the same input and are neighbours in the layout, compute
    together wherever Triton's kernels serve."""
    for names in groups:
        members = [model.get_submodule(name) for name in names]
        if len({member.bias is None for member in members}) == 1:
            Together([member for member in members if isinstance(member, MultiplexedLinear)])


def quantize_linears(model: PreTrainedModel, precision: Precision) -> None:
    """Quantizes the multiplexed linears and the output embedding, in place. The output embedding keeps 8 bits, since it
    costs more in quality than it weighs; the input embedding, where rows are only looked up, stays as it is."""
    for module in model.modules():
        if isinstance(module, MultiplexedLinear):
            module.quantize(precision)
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear) and can_quantize(head.weight):
        model.set_output_embeddings(QuantizedLinear(quantize(head.weight, Precision.INT8), head.bias))
