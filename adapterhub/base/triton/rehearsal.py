"""Steps of nobody, of the kinds that serving has, for before the first request. Without them kernels would be compiled
and graphs captured while those who come first wait, and everybody else with them.

They read KV blocks and write to none, and their adapter has no linears, so nothing remains of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from adapterhub.base.batch import Forward, Segment, Span
from adapterhub.base.kv import KVCache
from adapterhub.base.triton.tables import TILE
from adapterhub.swap.layout import Factors

_RANKS = (16, 32, 64)  # up to each of these, prompts take another kernel


@dataclass(frozen=True)
class Nobody:
    """An adapter in the pool that changes nothing, of a base with so many `targets`."""

    rank: int
    targets: int
    factors: Mapping[str, Factors] = field(default_factory=dict)

    @property
    def offsets(self) -> torch.Tensor:
        return torch.full((self.targets,), -1)


def rehearsals(targets: int, rows: Sequence[int], sequences: int, tokens: int) -> Iterator[Forward]:
    """For a base with so many targets, steps of at most so many sequences and tokens: prompts, short, long, and beside
    decoding; then decode steps of each of `rows`, the largest first, since their graphs share memory."""
    beside = min(sequences, tokens) - 1
    prompts = [[min(TILE, tokens)], [tokens], [1] * beside + [tokens - beside]]
    for lengths in prompts:
        yield _step(lengths, None)
        for rank in _RANKS:
            yield _step(lengths, Nobody(rank, targets))
    for count in sorted(rows, reverse=True):
        yield _step([1] * count, None)
        yield _step([1] * count, Nobody(_RANKS[0], targets))


def _step(lengths: list[int], adapter: Nobody | None) -> Forward:
    """Each sequence is a prompt's beginning, or its first token, and has an adapter of its own, if any."""
    spans, at = [], 0
    for length in lengths:
        spans.append(Span(at, length, length, (0,) * KVCache.blocks_for(length)))
        at += length
    return Forward(
        tokens=[0] * at,
        positions=[position for length in lengths for position in range(length)],
        slots=[-1] * at,
        wanted=[span.rows.stop - 1 for span in spans],
        spans=spans,
        segments=[] if adapter is None else [Segment(span.start, span.rows.stop, adapter) for span in spans],
    )
