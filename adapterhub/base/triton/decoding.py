"""Decode steps in buffers that stay where they are, so that on a GPU one launch of a captured graph is the whole step.

There are buffers for a few numbers of rows; a step takes the smallest that fit. What is left over is padded with rows
that see nothing, write nothing and have no adapter. Everything that changes from step to step is in the buffer, so a
graph serves any sequences and any adapters, also ones that were not there when it was captured. What it has the address
of stays: the base, the KV cache, the buffer; when the pool goes elsewhere, graphs are captured anew.

Graphs take memory of their own. Where there is none, that is an error of the step, like any other lack of memory; and
who sees to it drops them, and says when some may be captured again.
"""

from __future__ import annotations

import logging
from itertools import pairwise

import torch

from adapterhub.base.batch import Batch, Forward
from adapterhub.base.kv import KVCache
from adapterhub.base.lost import out_of_memory
from adapterhub.base.model import Base
from adapterhub.base.triton.capture import Captured, Capturer
from adapterhub.base.triton.tables import Sizes, Tables, aligned, fill, host_buffer
from adapterhub.swap.peft import MAX_RANK
from adapterhub.swap.pool import Pool

log = logging.getLogger(__name__)
ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64)


def sizes_for(sequences: int) -> tuple[int, ...]:
    """Of `ROWS`, those that decode steps of at most so many sequences take."""
    return tuple(rows for before, rows in pairwise((0, *ROWS)) if before < sequences)


class DecodeSteps:
    """Of one base, with one KV cache and one pool. Only the engine's thread may call this."""

    def __init__(self, base: Base, kv: KVCache, pool: Pool, capture: bool = True) -> None:
        """With `capture`, on a GPU, steps are replayed from graphs, which are captured when first needed, and
        `may_capture`."""
        self._base, self._kv, self._pool = base, kv, pool
        self._longest = kv.blocks_for(min(base.context, kv.capacity))
        self._buffers: dict[int, Tables] = {}
        self._graphs: dict[tuple[int, bool], Captured] = {}
        self._capturer = Capturer(base.device)
        self._captures = capture and base.device.type == "cuda"  # and the base's forward can be, as far as is known
        self.may_capture = True
        self._captured_on = 0  # the address of the pool's memory

    @property
    def graphs(self) -> int:
        """How many are there."""
        return len(self._graphs)

    def drop_graphs(self) -> None:
        """Gives their memory back."""
        self._graphs.clear()
        self._capturer.let_go()

    def take(self, forward: Forward) -> bool:
        """Whether `forward` is such a step, and not too large."""
        return len(forward.tokens) <= ROWS[-1] and all(span.length == 1 for span in forward.spans)

    def logits(self, forward: Forward) -> torch.Tensor:
        """[number of wanted rows, vocabulary], to be used before the next step. Raises torch.OutOfMemoryError, also
        when there is no memory for a graph."""
        rows = next(rows for rows in ROWS if rows >= len(forward.tokens))
        tables = self._filled(rows, forward)
        batch = Batch(
            tables.tokens,
            tables.positions,
            forward.spans,
            forward.segments,
            self._kv,
            tables.slots,
            self._pool.tensor,
            tables,
        )
        captured = self._graph(rows, batch) if self._captures else None
        if captured is None:
            logits = self._base.logits(batch, tables.wanted)
        else:
            captured.graph.replay()
            logits = captured.logits
        return logits[: len(forward.wanted)]

    def _filled(self, rows: int, forward: Forward) -> Tables:
        if rows not in self._buffers:
            sizes = Sizes(
                rows=rows,
                wanted=rows,
                adapters=rows,
                rank=MAX_RANK,
                tiles=0,
                lora_tiles=0,
                blocks=rows * self._longest,
                targets=len(self._base.layout.targets),
                aligned=aligned(self._base.layout),
            )
            buffer = torch.zeros(sizes.numel, dtype=torch.int64, device=self._base.device)
            self._buffers[rows] = Tables.of(buffer, sizes)
        tables = self._buffers[rows]
        # the KV blocks come last: what is beyond those in use need not be copied
        used = tables.sizes._replace(blocks=sum(len(span.blocks) for span in forward.spans))
        host = host_buffer(used.numel, self._base.device)
        fill(Tables.of(host, used), forward)
        tables.buffer[: used.numel].copy_(host, non_blocking=True)
        return tables

    def _graph(self, rows: int, batch: Batch) -> Captured | None:
        """The graph for so many rows, with or without adapters; None where there is none, and none can be captured."""
        assert batch.pool is not None
        assert batch.tables is not None
        wanted = batch.tables.wanted
        if self._captured_on != batch.pool.data_ptr():
            self.drop_graphs()
            self._captured_on = batch.pool.data_ptr()
        key = (rows, bool(batch.segments))
        if key not in self._graphs and self.may_capture:
            try:
                self._graphs[key] = self._capturer.capture(lambda: self._base.logits(batch, wanted))
            except RuntimeError as error:
                if out_of_memory(error):
                    raise
                log.warning("Decode steps are launched one kernel at a time, which is slower: %s", error)
                self._captures = False
        return self._graphs.get(key)
