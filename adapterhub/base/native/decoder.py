"""The native step for bases of the Llama family: from a batch to logits in one call, without the interpreter."""

from __future__ import annotations

import ctypes
import weakref

import torch

from adapterhub.base.batch import Batch
from adapterhub.base.kv import KVCache
from adapterhub.base.model import Base
from adapterhub.base.native import Isa, best_isa, library
from adapterhub.base.native.model import NativeModel
from adapterhub.base.native.ops import segment
from adapterhub.base.native.structs import Segment, Step, address


class NativeDecoder:
    """Holds the C structures that point into the model's weights and the KV cache. One per engine."""

    def __init__(self, base: Base, kv: KVCache, isa: Isa | None = None) -> None:
        built = library()
        assert built is not None, "check `supports` first"
        self._library = built
        self._model = NativeModel(base, kv)
        self._handle = built.adapterhub_decoder(torch.get_num_threads(), best_isa() if isa is None else isa)
        weakref.finalize(self, built.adapterhub_decoder_free, self._handle)

    def logits(self, batch: Batch, rows: torch.Tensor) -> torch.Tensor:
        """One forward; fp32 logits [len(rows), vocabulary] of the rows asked for."""
        count = len(batch.tokens)
        embedded = self._model.embed(batch.tokens)
        cos, sin = self._model.angles(batch.positions)
        contexts = (batch.positions + 1).int()
        tables = torch.tensor([block for span in batch.spans for block in span.blocks], dtype=torch.int32)
        starts, at = [], 0
        for span in batch.spans:
            starts += [at] * span.length
            at += len(span.blocks)
        table_at = torch.tensor(starts, dtype=torch.int32)
        wanted = rows.int()
        logits = torch.empty(len(rows), self._model.vocabulary)
        assert batch.slots is not None
        assert batch.pool is not None
        segments = (Segment * len(batch.segments))(*map(segment, batch.segments))
        step = Step(
            tokens=count,
            embedded=address(embedded),
            cos=address(cos),
            sin=address(sin),
            slots=address(batch.slots),
            contexts=address(contexts),
            tables=address(tables),
            table_at=address(table_at),
            pool=address(batch.pool),
            segments=segments,
            num_segments=len(batch.segments),
            rows=address(wanted),
            num_rows=len(rows),
            logits=address(logits),
        )
        self._library.adapterhub_step(self._handle, ctypes.byref(self._model.struct), ctypes.byref(step))
        return logits
