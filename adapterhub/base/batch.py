"""What one forward of the base works on. Sequences are laid end to end in one row of tokens, without padding.

The model's linears and attention layers find the batch of the forward they are in through the `Slot` that
injection gave them; the engine's thread sets it with `running`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from adapterhub.swap.layout import Factors

if TYPE_CHECKING:
    from adapterhub.base.triton.learning import Gradients
    from adapterhub.base.triton.tables import Tables

KV_BLOCK = 16  # tokens in one block of the KV cache


@dataclass(frozen=True)
class Span:
    """One sequence's tokens in this forward: rows [start, start + length), which end a context of `context` tokens.

    `blocks` are the sequence's KV blocks, in order; empty when there is no cache and the whole context is here.
    """

    start: int
    length: int
    context: int
    blocks: tuple[int, ...] = ()

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.length)


class Adapter(Protocol):
    """Whatever has the factors of linears: a hold on a block in the pool, or the parameters of a training job."""

    @property
    def factors(self) -> Mapping[str, Factors]: ...


class TrainedAdapter(Adapter, Protocol):
    """The parameters of a training job, with where the gradient of each factor is added up."""

    @property
    def gradients(self) -> Mapping[str, Factors]: ...


class KeyValues(Protocol):
    """What attention needs of a KV cache."""

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor | None) -> None: ...
    def read(self, layer: int, span: Span) -> tuple[torch.Tensor, torch.Tensor]: ...
    def read_many(self, layer: int, tables: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...
    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]: ...


class PooledAdapter(Adapter, Protocol):
    """An adapter whose block is in the pool, where kernels find it by offsets."""

    @property
    def rank(self) -> int: ...

    @property
    def offsets(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class Segment:
    """Neighbouring rows that one adapter changes. Rows in no segment get the base alone."""

    start: int
    end: int
    adapter: Adapter

    @property
    def rows(self) -> slice:
        return slice(self.start, self.end)


class Forward(NamedTuple):
    """A forward of the base in plain numbers, as it goes to the device; a list has one entry for each row."""

    tokens: list[int]
    positions: list[int]
    slots: list[int]  # where its key and value go in the KV cache
    wanted: list[int]  # the rows whose logits are asked for
    spans: list[Span]
    segments: list[Segment]


@dataclass
class Batch:
    """tokens [T] and positions [T] on the device; spans cover the rows in order; segments are disjoint, in order."""

    tokens: torch.Tensor
    positions: torch.Tensor
    spans: list[Span]
    segments: list[Segment]
    kv: KeyValues | None = None
    slots: torch.Tensor | None = None  # [T] where each token's key and value go in the KV cache
    pool: torch.Tensor | None = None  # where the segments' adapters lie; None where they are torch's to find
    tables: Tables | None = None  # where Triton's kernels serve, which then look things up here
    gradients: Gradients | None = None  # where they learn: what they add to in the backward
    give_way: Callable[[], None] | None = None  # called by each layer of a training forward, and of its backward
    anchor: torch.Tensor | None = None  # in a training forward: a leaf that makes autograd record from the first layer
    computed: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)  # see `inject.Together`
    _decode_masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def decodes(self) -> list[Span]:
        """Spans of one token: computed together."""
        return [s for s in self.spans if s.length == 1]

    @cached_property
    def prefills(self) -> list[Span]:
        return [s for s in self.spans if s.length > 1]

    @cached_property
    def ends(self) -> torch.Tensor:
        """[spans + 1] in int32: 0, and where each ends."""
        return send(torch.tensor([0, *(s.rows.stop for s in self.spans)]), self.tokens.device).int()

    @property
    def longest(self) -> int:
        """Of the spans' lengths."""
        return max(s.length for s in self.spans)

    @cached_property
    def decode_rows(self) -> torch.Tensor:
        """[n] the rows of `decodes`."""
        return torch.tensor([s.start for s in self.decodes], device=self.tokens.device)

    @cached_property
    def decode_tables(self) -> torch.Tensor:
        """[n, m] the KV blocks of `decodes`, the shorter ones padded with their first."""
        longest = max(len(s.blocks) for s in self.decodes)
        padded = [list(s.blocks) + [s.blocks[0]] * (longest - len(s.blocks)) for s in self.decodes]
        return torch.tensor(padded, device=self.tokens.device)

    def decode_mask(self, window: int | None) -> torch.Tensor:
        """[n, m * block size], True where the token of each of `decodes` may look. Made once for all layers."""
        if window not in self._decode_masks:
            ends = torch.tensor([s.context for s in self.decodes], device=self.tokens.device).unsqueeze(1)
            at = torch.arange(self.decode_tables.shape[1] * KV_BLOCK, device=self.tokens.device).unsqueeze(0)
            mask = at < ends
            self._decode_masks[window] = mask if window is None else mask & (at >= ends - window)
        return self._decode_masks[window]


class Batches(Protocol):
    """Where a linear looks up what it works on."""

    def batch_of(self, rows: int) -> Batch | None:
        """Where its input has so many rows; None: the base alone."""
        ...


def send(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`numbers`, which lie in the host's memory, on `device`, without waiting for it."""
    return (numbers.pin_memory() if device.type == "cuda" else numbers).to(device, non_blocking=True)


class Slot:
    """Where a model's layers look up the batch of the forward they are in. One per loaded base."""

    def __init__(self) -> None:
        self.batch: Batch | None = None

    def batch_of(self, rows: int) -> Batch | None:
        """The batch, which has one row for each token."""
        return self.batch

    @contextmanager
    def running(self, batch: Batch) -> Iterator[None]:
        """Within the block the layers work on `batch`; a training forward gives way to other forwards in between."""
        outer, self.batch = self.batch, batch
        try:
            yield
        finally:
            self.batch = outer
