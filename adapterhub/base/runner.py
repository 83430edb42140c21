"""Turns a step's work into one forward of the base, and the forward into tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch

from adapterhub.base.batch import KV_BLOCK, Batch, Segment, Span
from adapterhub.base.kv import KVCache
from adapterhub.base.model import Base, Forward
from adapterhub.base.request import Token
from adapterhub.base.sampler import sample
from adapterhub.base.scheduler import Sequence, Work


class Outcome(NamedTuple):
    """What a step did for one sequence: `token` is its new one, None while its prompt is not through."""

    work: Work
    token: Token | None = None
    diverged: bool = False  # its numbers were not finite, so that there is no token to choose


def run(base: Base, kv: KVCache, forward: Forward, work: list[Work]) -> list[Outcome]:
    """One step: one forward over all rows of `work`, and a token for each sequence whose prompt is through."""
    ordered = sorted(work, key=_adapter_of)  # rows of one adapter are neighbours
    with torch.no_grad():
        batch = _batch(base, kv, ordered)
        sampling = [(w, s.start + s.length - 1) for w, s in zip(ordered, batch.spans, strict=True) if w.samples]
        rows = torch.tensor([row for _, row in sampling], dtype=torch.long, device=base.device)
        logits = forward(batch, rows)
        tokens = sample(logits, [w.sequence for w, _ in sampling], base.end_tokens)
    outcomes = [Outcome(w, token, token is None) for (w, _), token in zip(sampling, tokens, strict=True)]
    return outcomes + [Outcome(w) for w in ordered if not w.samples]


def _adapter_of(work: Work) -> str:
    adapter = work.sequence.request.adapter
    return adapter.digest if adapter else ""


def _batch(base: Base, kv: KVCache, work: list[Work]) -> Batch:
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    spans: list[Span] = []
    for w in work:
        s, first, end = w.sequence, w.sequence.computed, w.sequence.computed + w.tokens
        used = tuple(s.blocks[: kv.blocks_for(end)])
        spans.append(Span(len(tokens), w.tokens, end, used))
        tokens += s.tokens[first:end]
        positions += range(first, end)
        slots += [s.blocks[p // KV_BLOCK] * KV_BLOCK + p % KV_BLOCK for p in range(first, end)]
    return Batch(
        tokens=torch.tensor(tokens, device=base.device),
        positions=torch.tensor(positions, device=base.device),
        spans=spans,
        segments=_segments([w.sequence for w in work], spans),
        kv=kv,
        slots=torch.tensor(slots, device=base.device),
    )


def _segments(sequences: list[Sequence], spans: list[Span]) -> list[Segment]:
    """One segment for each run of rows that share an adapter's block."""
    segments: list[Segment] = []
    for sequence, span in zip(sequences, spans, strict=True):
        if sequence.hold is None:
            continue
        end = span.start + span.length
        if segments and segments[-1].adapter.resident is sequence.hold.resident:  # type: ignore[attr-defined]
            segments[-1] = Segment(segments[-1].start, end, segments[-1].adapter)
        else:
            segments.append(Segment(span.start, end, sequence.hold))
    return segments
