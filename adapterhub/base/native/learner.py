"""The native training forward, and its backward, for bases of the Llama family on processors with AVX-512
BF16; those with AMX multiply faster.

Autograd sees one operation: from the adapters of a batch to the log probabilities of the tokens that should come. Its
backward adds to the adapters' `gradients`.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, cast

import torch

from adapterhub.base.batch import Batch, Segment, TrainedAdapter
from adapterhub.base.model import Base
from adapterhub.base.native import Isa, best_isa, library
from adapterhub.base.native.model import NativeModel, supports
from adapterhub.base.native.structs import Piece, Sequence, Trained, address
from adapterhub.base.places import PlacesOf
from adapterhub.config import format_bytes
from adapterhub.swap.memory import available_bytes, streaming_memory

_TILE = 16  # rows; each is of one adapter
_DEPTH = 32  # what all widths must be a multiple of
_VOCABULARY = 4096  # logits of a row in one stage, as in piece.h


class _Stage(IntEnum):
    BEGIN = 0
    ATTENTION = 1
    MLP = 2
    LOGITS = 3
    LOSSES = 4
    BACK_LOGITS = 5
    BACK_BEGIN = 6
    BACK_MLP = 7
    BACK_ATTENTION = 8


def can_learn(base: Base) -> bool:
    """Whether `Learner` trains adapters of this base."""
    if not supports(base) or best_isa() < Isa.AVX512:
        return False
    config, attention = base.model.config, base.model.model.layers[0].self_attn
    quantized = getattr(attention.q_proj, "quantized", None) is not None
    head_dim = attention.head_dim
    widths = (config.hidden_size, config.intermediate_size, head_dim)
    plain = not quantized and not hasattr(attention, "q_norm") and base.model.lm_head.bias is None
    return plain and all(width % _DEPTH == 0 for width in widths)


class Learner:
    """Keeps its working memory from one batch to the next, until `release`. One batch at a time: its backward must
    come before the next forward."""

    def __init__(self, base: Base) -> None:
        built = library()
        assert built is not None, "check `can_learn` first"
        self._library = built
        self._base, self._model = base, NativeModel(base)
        self._memory: torch.Tensor | None = None
        self._latest: _Prepared | None = None
        self._places = PlacesOf(base.layout)
        self._handle = built.adapterhub_learner(torch.get_num_threads(), best_isa())
        weakref.finalize(self, built.adapterhub_learner_free, self._handle)

    def logprobs(self, batch: Batch, rows: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One forward. Returns the log probabilities [n] of `targets` [n] after `rows` [n], which have a backward where
        the batch has an anchor, and whether each target was the likeliest [n].

        Raises torch.OutOfMemoryError.
        """
        prepared = self._latest = self._prepare(batch, rows, targets)
        if batch.anchor is None:
            return self.forward(prepared), prepared.right
        return _Logprobs.apply(batch.anchor, self, prepared), prepared.right

    def release(self) -> None:
        """Gives the memory back."""
        self._memory = self._latest = None

    def forward(self, prepared: _Prepared) -> torch.Tensor:
        self._do(prepared, _Stage.BEGIN)
        for layer in range(self._model.num_layers):
            self._do(prepared, _Stage.ATTENTION, layer)
            self._do(prepared, _Stage.MLP, layer)
        for first in range(0, self._model.vocabulary, _VOCABULARY):
            self._do(prepared, _Stage.LOGITS, first)
        self._do(prepared, _Stage.LOSSES)
        return prepared.logprobs

    def backward(self, prepared: _Prepared, slopes: torch.Tensor) -> None:
        if prepared is not self._latest:
            raise RuntimeError("the backward of a batch must come before the next batch's forward")
        slopes = slopes.float().contiguous()
        prepared.piece.slopes = address(slopes)
        for first in range(0, self._model.vocabulary, _VOCABULARY):
            self._do(prepared, _Stage.BACK_LOGITS, first)
        self._do(prepared, _Stage.BACK_BEGIN)
        for layer in reversed(range(self._model.num_layers)):
            self._do(prepared, _Stage.BACK_MLP, layer)
            self._do(prepared, _Stage.BACK_ATTENTION, layer)

    def _do(self, prepared: _Prepared, stage: _Stage, at: int = 0) -> None:
        if prepared.batch.give_way is not None:
            prepared.batch.give_way()
        model, piece = ctypes.byref(self._model.struct), ctypes.byref(prepared.piece)
        self._library.adapterhub_learn(self._handle, model, piece, stage, at)

    def _prepare(self, batch: Batch, rows: torch.Tensor, targets: torch.Tensor) -> _Prepared:
        place = torch.empty(len(batch.tokens), dtype=torch.long)
        jobs, end = [], 0
        for start, stop, segment in _stretches(len(batch.tokens), batch.segments):
            begin, end = end, end + -(-(stop - start) // _TILE) * _TILE
            place[start:stop] = torch.arange(begin, begin + stop - start)
            if segment is not None:
                jobs.append(self._trained(begin, end, cast(TrainedAdapter, segment.adapter)))
        cos, sin = (_spread(angles, place, end) for angles in self._model.angles(batch.positions))
        embedded = _spread(self._model.embed(batch.tokens), place, end)
        learned, following = place[rows].int(), targets.int()
        logprobs, right = torch.empty(len(rows)), torch.empty(len(rows), dtype=torch.bool)
        piece = Piece(
            rows=end,
            kept_layers=1 if batch.anchor is None else self._model.num_layers,
            embedded=address(embedded),
            cos=address(cos),
            sin=address(sin),
            sequences=(Sequence * len(batch.spans))(*(Sequence(int(place[s.start]), s.length) for s in batch.spans)),
            num_sequences=len(batch.spans),
            jobs=(Trained * len(jobs))(*jobs),
            num_jobs=len(jobs),
            learned=address(learned),
            next=address(following),
            num_learned=len(rows),
            logprobs=address(logprobs),
            right=address(right),
        )
        piece.memory = address(self._room(piece))
        return _Prepared(batch, piece, logprobs, right, (cos, sin, embedded, learned, following))

    def _room(self, piece: Piece) -> torch.Tensor:
        needed = self._library.adapterhub_learner_memory(ctypes.byref(self._model.struct), ctypes.byref(piece))
        if self._memory is None or len(self._memory) < needed:
            self._memory = None  # before more is asked for
            available = available_bytes()
            if available is not None and needed > available:  # its pages are taken one by one, too late for an error
                raise torch.OutOfMemoryError(
                    f"{piece.rows} tokens at once need {format_bytes(needed)} of memory, and {format_bytes(available)} "
                    "are left. Train on shorter examples."
                )
            self._memory = streaming_memory(needed)
        return self._memory

    def _trained(self, start: int, end: int, adapter: TrainedAdapter) -> Trained:
        places = self._places(adapter)
        tensors = (places.factors, places.gradients, places.a, places.b, places.a_gradient, places.b_gradient)
        return Trained(start, end, places.rank, *map(address, tensors))


@dataclass(eq=False)
class _Prepared:
    """A batch as the native code takes it."""

    batch: Batch
    piece: Piece
    logprobs: torch.Tensor
    right: torch.Tensor
    kept_alive: tuple[torch.Tensor, ...]


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, learner: Learner, prepared: _Prepared) -> torch.Tensor:
        ctx.learner, ctx.prepared = learner, prepared
        return learner.forward(prepared)

    @staticmethod
    def backward(ctx: Any, slopes: torch.Tensor) -> tuple[None, None, None]:
        ctx.learner.backward(ctx.prepared, slopes)
        return None, None, None


def _stretches(count: int, segments: list[Segment]) -> Iterator[tuple[int, int, Segment | None]]:
    """The batch's rows from end to end: each segment, and what lies between two."""
    at = 0
    for segment in segments:
        if at < segment.start:
            yield at, segment.start, None
        yield segment.start, segment.end, segment
        at = segment.end
    if at < count:
        yield at, count, None


def _spread(numbers: torch.Tensor, place: torch.Tensor, rows: int) -> torch.Tensor:
    """[rows, ..] with `numbers` in the rows `place`, and zeros elsewhere."""
    return numbers.new_zeros(rows, *numbers.shape[1:]).index_copy_(0, place, numbers)
