"""Turns a step's work into one forward of the base, and the forward into tokens."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch

from adapterhub.base.batch import KV_BLOCK, Batch, Forward, Segment, Span
from adapterhub.base.kv import KVCache
from adapterhub.base.model import Base
from adapterhub.base.native.decoder import NativeDecoder
from adapterhub.base.native.model import supports
from adapterhub.base.request import Token
from adapterhub.base.sampler import sample, score
from adapterhub.base.scheduler import Sequence, Work
from adapterhub.base.triton import usable
from adapterhub.base.triton.decoding import DecodeSteps, sizes_for
from adapterhub.base.triton.rehearsal import rehearsals
from adapterhub.base.triton.tables import tables_for
from adapterhub.swap.gpu import empty_cache
from adapterhub.swap.hold import Hold
from adapterhub.swap.pool import Pool


class Outcome(NamedTuple):
    """What a step did for one sequence: `token` is its new one, None while its prompt is not through."""

    work: Work
    token: Token | None = None
    diverged: bool = False  # its numbers were not finite, so that there is no token to choose
    scored: tuple[Token, ...] = ()  # the next of its prompt with their log probabilities, where these are asked for


class Runner:
    """Runs steps on one base, with one KV cache and one pool: natively where the base's family is known, by Triton's
    kernels on a GPU."""

    def __init__(self, base: Base, kv: KVCache, pool: Pool) -> None:
        self.base, self.kv, self.pool = base, kv, pool
        self.native = supports(base)
        self._logits = NativeDecoder(base, kv).logits if self.native else base.logits
        self._kernels = usable(base.device)
        self._decode_steps = DecodeSteps(base, kv, pool) if self._kernels else None

    def run(self, work: list[Work]) -> list[Outcome]:
        """One step: one forward over all rows of `work`, and a token for each sequence whose prompt is through.

        Where it raises, as for lack of memory, no sequence is any further: run again, it gives the same tokens.
        """
        ordered = sorted(work, key=_adapter_of)  # rows of one adapter are neighbours
        sampling = [w.sequence for w in ordered if w.samples]
        scoring = [(w.sequence, row) for w in ordered for row in w.scores]
        with torch.no_grad():
            logits = self._forward(self.forward(ordered))
            tokens = iter(sample(logits[: len(sampling)], sampling, self.base.end_tokens))
            scored = iter(score(logits[len(sampling) :], scoring))
        return [_outcome(w, next(tokens) if w.samples else None, [next(scored) for _ in w.scores]) for w in ordered]

    def warm_up(self, sequences: int, tokens: int) -> None:
        """Before the first request: compiles the kernels that steps of at most so many sequences and tokens need, and
        captures their graphs. Raises torch.OutOfMemoryError, and whatever keeps the kernels from running."""
        if self._decode_steps is None:
            return
        targets, tokens = len(self.base.layout.targets), min(tokens, self.base.context, self.kv.capacity)
        with torch.no_grad():
            for forward in rehearsals(targets, sizes_for(sequences), sequences, tokens):
                self._forward(forward)

    def give_back(self) -> None:
        """All memory that is kept only to be faster; no graphs are captured until `may_capture` says so."""
        self.may_capture(False)
        if self._decode_steps is not None:
            self._decode_steps.drop_graphs()
        if self.base.device.type == "cuda":
            empty_cache()

    def may_capture(self, may: bool) -> None:
        """Whether memory may be taken for graphs from now on."""
        if self._decode_steps is not None:
            self._decode_steps.may_capture = may

    def _forward(self, forward: Forward) -> torch.Tensor:
        """Logits of the rows that are wanted."""
        if self._decode_steps is not None and self._decode_steps.take(forward):
            return self._decode_steps.logits(forward)
        batch = self.batch(forward)
        wanted = batch.tables.wanted if batch.tables else torch.tensor(forward.wanted, dtype=torch.long)
        return self._logits(batch, wanted.to(self.base.device))

    def forward(self, work: list[Work]) -> Forward:
        """What is computed for `work`, in its order; the rows to sample from are wanted first, then those of prompts
        that are scored."""
        step = Forward([], [], [], [], [], [])
        scored: list[int] = []
        for w in work:
            s, first, end = w.sequence, w.sequence.computed, w.sequence.computed + w.tokens
            used = tuple(s.blocks[: self.kv.blocks_for(end)])
            step.spans.append(Span(len(step.tokens), w.tokens, end, used))
            scored.extend(len(step.tokens) + row - first for row in w.scores)
            step.tokens.extend(s.tokens[first:end])
            step.positions.extend(range(first, end))
            step.slots.extend(s.blocks[p // KV_BLOCK] * KV_BLOCK + p % KV_BLOCK for p in range(first, end))
            if w.samples:
                step.wanted.append(len(step.tokens) - 1)
        step.wanted.extend(scored)
        step.segments.extend(_segments([w.sequence for w in work], step.spans))
        return step

    def batch(self, forward: Forward) -> Batch:
        """The same on the device."""
        device = self.base.device
        tables = tables_for(forward, self.base.layout, device) if self._kernels else None
        return Batch(
            tokens=tables.tokens if tables else torch.tensor(forward.tokens, device=device),
            positions=tables.positions if tables else torch.tensor(forward.positions, device=device),
            spans=forward.spans,
            segments=forward.segments,
            kv=self.kv,
            slots=tables.slots if tables else torch.tensor(forward.slots, device=device),
            pool=self.pool.tensor,
            tables=tables,
        )


def _outcome(work: Work, token: Token | None, scored: list[Token | None]) -> Outcome:
    known = tuple(t for t in scored if t is not None)
    return Outcome(work, token, len(known) < len(scored) or (work.samples and token is None), known)


def _adapter_of(work: Work) -> str:
    adapter = work.sequence.request.adapter
    return adapter.digest if adapter else ""


def _segments(sequences: list[Sequence], spans: list[Span]) -> list[Segment]:
    """One segment for each run of rows that share an adapter's block."""
    segments: list[Segment] = []
    for sequence, span in zip(sequences, spans, strict=True):
        if sequence.hold is None:
            continue
        end = span.start + span.length
        last = segments[-1] if segments else None
        if last is not None and cast(Hold, last.adapter).resident is sequence.hold.resident:
            segments[-1] = Segment(last.start, end, last.adapter)
        else:
            segments.append(Segment(span.start, end, sequence.hold))
    return segments
