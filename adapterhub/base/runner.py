"""Turns a step's work into one forward of the base, and the forward into tokens."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch

from adapterhub.base.batch import KV_BLOCK, Batch, Segment, Span
from adapterhub.base.kv import KVCache
from adapterhub.base.model import Base
from adapterhub.base.native.decoder import NativeDecoder, supports
from adapterhub.base.request import Token
from adapterhub.base.sampler import sample
from adapterhub.base.scheduler import Sequence, Work
from adapterhub.swap.hold import Hold
from adapterhub.swap.pool import Pool


class Outcome(NamedTuple):
    """What a step did for one sequence: `token` is its new one, None while its prompt is not through."""

    work: Work
    token: Token | None = None
    diverged: bool = False  # its numbers were not finite, so that there is no token to choose


class Runner:
    """Runs steps on one base, with one KV cache and one pool: natively where the base's family is known."""

    def __init__(self, base: Base, kv: KVCache, pool: Pool) -> None:
        self.base, self.kv, self.pool = base, kv, pool
        self.native = supports(base)
        self._logits = NativeDecoder(base, kv).logits if self.native else base.logits

    def run(self, work: list[Work]) -> list[Outcome]:
        """One step: one forward over all rows of `work`, and a token for each sequence whose prompt is through."""
        ordered = sorted(work, key=_adapter_of)  # rows of one adapter are neighbours
        with torch.no_grad():
            batch = self.batch(ordered)
            sampling = [(w, s.start + s.length - 1) for w, s in zip(ordered, batch.spans, strict=True) if w.samples]
            rows = torch.tensor([row for _, row in sampling], dtype=torch.long, device=self.base.device)
            logits = self._logits(batch, rows)
            tokens = sample(logits, [w.sequence for w, _ in sampling], self.base.end_tokens)
        outcomes = [Outcome(w, token, token is None) for (w, _), token in zip(sampling, tokens, strict=True)]
        return outcomes + [Outcome(w) for w in ordered if not w.samples]

    def batch(self, work: list[Work]) -> Batch:
        """The forward's input for `work`, in its order."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        spans: list[Span] = []
        for w in work:
            s, first, end = w.sequence, w.sequence.computed, w.sequence.computed + w.tokens
            used = tuple(s.blocks[: self.kv.blocks_for(end)])
            spans.append(Span(len(tokens), w.tokens, end, used))
            tokens += s.tokens[first:end]
            positions += range(first, end)
            slots += [s.blocks[p // KV_BLOCK] * KV_BLOCK + p % KV_BLOCK for p in range(first, end)]
        return Batch(
            tokens=torch.tensor(tokens, device=self.base.device),
            positions=torch.tensor(positions, device=self.base.device),
            spans=spans,
            segments=_segments([w.sequence for w in work], spans),
            kv=self.kv,
            slots=torch.tensor(slots, device=self.base.device),
            pool=self.pool.tensor,
        )


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
