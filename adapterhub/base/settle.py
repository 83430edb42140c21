"""Where a base's weights lie on a CPU: all in one piece of memory, in the order in which they are read."""

from __future__ import annotations

from torch import nn

from adapterhub.swap.memory import streaming_memory

_ALIGNMENT = 64  # bytes: a cache line


def settle(model: nn.Module) -> None:
    """Moves the model's parameters and buffers into one piece of memory; what they were views of can go.

    Tensors of the same name follow each other in the order of the modules, so that those of linears that read the same
    input (q, k, v; gate, up) lie side by side and can be used as one.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    tensors.sort(key=lambda named: named[0].rpartition(".")[2])
    memory = streaming_memory(sum(_aligned(tensor.nbytes) for _, tensor in tensors))
    at = 0
    for _, tensor in tensors:
        place = memory[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        place.copy_(tensor.data)
        tensor.data = place
        at += _aligned(tensor.nbytes)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
