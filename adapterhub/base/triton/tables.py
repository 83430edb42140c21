"""What the kernels of one step look up: one buffer of int64 on the device, filled by one copy and made for all layers.

Nothing in it is a Python number that a launch depends on, but for the sizes: a captured graph is replayed with other
sequences, contexts and adapters by filling the same buffer again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch

from adapterhub.base.batch import Forward, PooledAdapter, Segment, Span
from adapterhub.swap.layout import Layout

TILE = 64  # rows of one sequence, or of one adapter, that kernels work on together
_EVEN = 2  # parts begin at multiples of so many numbers: Triton compiles a kernel again for pointers off 16 bytes


class Sizes(NamedTuple):
    """How many of each there is room for. Without tiles every row is a sequence of its own, one token each."""

    rows: int
    wanted: int
    adapters: int
    rank: int  # the largest one
    tiles: int
    lora_tiles: int
    blocks: int
    targets: int  # linears that the base's layout has
    aligned: bool  # whether every A and B of that layout begins at a multiple of 16 bytes

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the fields of `Tables`, in their order."""
        rows = ((self.rows,),) * 6
        factors = ((self.adapters,), (self.adapters, self.targets))
        return (*rows, (self.wanted,), *factors, (self.tiles, 2), (self.lora_tiles, 2), (self.blocks,))

    @property
    def numel(self) -> int:
        return sum(_room(shape) for shape in self.shapes)


@dataclass(frozen=True)
class Tables:
    """Views of one buffer of int64. What is to be filled anew at each step lies first, the KV blocks last."""

    buffer: torch.Tensor  # all of it
    sizes: Sizes
    tokens: torch.Tensor  # [rows]
    positions: torch.Tensor  # [rows]
    slots: torch.Tensor  # [rows] where its key and value go in the KV cache; -1: nowhere
    contexts: torch.Tensor  # [rows] how many tokens of its sequence it sees, itself the last; 0 for one that pads
    firsts: torch.Tensor  # [rows] where its sequence's KV blocks begin in `blocks`
    adapters: torch.Tensor  # [rows] its place in `ranks` and `offsets`; -1: the base alone
    wanted: torch.Tensor  # [wanted] the rows whose logits are asked for
    ranks: torch.Tensor  # [adapters]
    offsets: torch.Tensor  # [adapters, targets] where A of each linear lies in the pool, and B after it; -1: nowhere
    tiles: torch.Tensor  # [tiles, 2] rows [start, end) of one sequence, at most TILE; none: every row is one
    lora_tiles: torch.Tensor  # [lora_tiles, 2] rows [start, end) of one adapter, at most TILE
    blocks: torch.Tensor  # [blocks] the KV blocks of the sequences, one sequence after the other

    @classmethod
    def of(cls, buffer: torch.Tensor, sizes: Sizes) -> Tables:
        """Views of `buffer` [at least sizes.numel]."""
        parts, at = [], 0
        for shape in sizes.shapes:
            numel = torch.Size(shape).numel()
            parts.append(buffer[at : at + numel].view(shape))
            at += _room(shape)
        return cls(buffer, sizes, *parts)

    @property
    def decoding(self) -> bool:
        """Whether every row is a sequence of its own."""
        return not len(self.tiles)


def tables_for(forward: Forward, layout: Layout, device: torch.device) -> Tables:
    """On `device`, in a buffer of their own, for a base of this `layout`."""
    decoding = all(span.length == 1 for span in forward.spans)
    sizes = Sizes(
        rows=len(forward.tokens),
        wanted=len(forward.wanted),
        adapters=len(forward.segments),
        rank=max((cast(PooledAdapter, segment.adapter).rank for segment in forward.segments), default=0),
        tiles=0 if decoding else sum(1 for _ in tiles_of(forward.spans)),
        lora_tiles=0 if decoding else sum(1 for _ in tiles_of(forward.segments)),
        blocks=sum(len(span.blocks) for span in forward.spans),
        targets=len(layout.targets),
        aligned=aligned(layout),
    )
    host = host_buffer(sizes.numel, device)
    fill(Tables.of(host, sizes), forward)
    return Tables.of(host.to(device, non_blocking=True), sizes)


def aligned(layout: Layout) -> bool:
    """Whether a block that begins at a multiple of 16 bytes has every A and B at one, in 16 bits or more a number."""
    return all(target.n_in % 8 == 0 and target.n_out % 8 == 0 for target in layout.targets)


def host_buffer(numel: int, device: torch.device) -> torch.Tensor:
    """Zeros that can be copied to `device` without waiting; torch keeps the memory until the copy is done."""
    return torch.zeros(numel, dtype=torch.int64, pin_memory=device.type == "cuda")


def fill(tables: Tables, forward: Forward) -> None:
    """Writes a step into tables that lie in host memory and are zero; there may be more room than the step needs."""
    for part, values in (
        (tables.tokens, forward.tokens),
        (tables.positions, forward.positions),
        (tables.slots, forward.slots),
        (tables.wanted, forward.wanted),
    ):
        part.numpy()[: len(values)] = values
    tables.slots[len(forward.slots) :] = -1
    contexts, firsts, blocks = tables.contexts.numpy(), tables.firsts.numpy(), tables.blocks.numpy()
    at = 0
    for span in forward.spans:
        contexts[span.rows] = range(span.context - span.length + 1, span.context + 1)
        firsts[span.rows] = at
        blocks[at : at + len(span.blocks)] = span.blocks
        at += len(span.blocks)
    adapters, ranks, offsets = tables.adapters.numpy(), tables.ranks.numpy(), tables.offsets.numpy()
    adapters[:] = -1
    for i, segment in enumerate(forward.segments):
        adapter = cast(PooledAdapter, segment.adapter)
        adapters[segment.rows] = i
        ranks[i] = adapter.rank
        offsets[i] = adapter.offsets.numpy()
    for part, runs in ((tables.tiles, forward.spans), (tables.lora_tiles, forward.segments)):
        if len(part):
            part.numpy()[:] = list(tiles_of(runs))


def in_fp32(x: torch.Tensor) -> bool:
    """Whether matrix products of such numbers are made in fp32: of fp32, and of bf16 in the interpreter, which takes it
    for integers."""
    return x.dtype is torch.float32 or (x.dtype is torch.bfloat16 and x.device.type == "cpu")


def tiles_of(runs: Iterable[Span | Segment]) -> Iterator[tuple[int, int]]:
    """Rows [start, end) of each tile."""
    for run in runs:
        end = run.rows.stop
        for start in range(run.rows.start, end, TILE):
            yield start, min(start + TILE, end)


def _room(shape: tuple[int, ...]) -> int:
    return -(-torch.Size(shape).numel() // _EVEN) * _EVEN
