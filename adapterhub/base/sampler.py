"""Chooses the next token of every row of a step, all rows together."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from adapterhub.base.request import Logprob, Token
from adapterhub.base.scheduler import Sequence

_LIKELY = 512  # tokens that nearly always hold the mass of top_p; else the whole vocabulary is sorted


def sample(logits: torch.Tensor, sequences: Seq[Sequence], end_tokens: frozenset[int]) -> list[Token | None]:
    """logits [n, vocabulary], which are changed -> a token for each of the n sequences; None for a row whose numbers
    are not finite.

    A row is drawn by inverting its cumulative distribution at one uniform number from its own generator, so that a
    seed gives the same answer whatever else is in the batch and on whatever device.
    """
    if not sequences:
        return []
    logits = logits.float()
    asked = [i for i, s in enumerate(sequences) if s.request.sampling.logprobs is not None]
    plain = logits[asked].log_softmax(-1) if asked else None
    for row, sequence in zip(logits, sequences, strict=True):
        _adjust(row, sequence, end_tokens)
    best, tokens = logits.max(-1)  # a NaN anywhere in a row becomes its maximum
    drawn = [i for i, s in enumerate(sequences) if s.request.sampling.temperature > 0]
    if drawn:
        tokens[drawn] = _draw(logits[drawn], [sequences[i] for i in drawn])
    chosen: list[Token | None] = [
        Token(token) if finite else None
        for token, finite in zip(tokens.tolist(), best.isfinite().tolist(), strict=True)
    ]
    if plain is not None:
        for at, i in enumerate(asked):
            chosen[i] = _with_logprobs(chosen[i], plain[at], sequences[i].request.sampling.logprobs or 0)
    return chosen


def _adjust(row: torch.Tensor, sequence: Sequence, end_tokens: frozenset[int]) -> None:
    """Penalties, bias, and no early end, in place on one row [vocabulary]."""
    sampling = sequence.request.sampling
    if (sampling.frequency_penalty or sampling.presence_penalty) and sequence.counts:
        seen = torch.tensor(list(sequence.counts), device=row.device)
        times = torch.tensor(list(sequence.counts.values()), device=row.device)
        row[seen] -= sampling.frequency_penalty * times + sampling.presence_penalty
    if sampling.logit_bias:
        row[list(sampling.logit_bias)] += torch.tensor(list(sampling.logit_bias.values()), device=row.device)
    if end_tokens and sequence.produced < sampling.min_tokens:
        row[list(end_tokens)] = float("-inf")


def _draw(logits: torch.Tensor, sequences: Seq[Sequence]) -> torch.Tensor:
    samplings = [s.request.sampling for s in sequences]
    temperature = torch.tensor([s.temperature for s in samplings], device=logits.device).unsqueeze(1)
    top_p = torch.tensor([s.top_p for s in samplings], device=logits.device).unsqueeze(1)
    # without the maximum taken off first, a temperature near zero would make every logit infinite
    weights = ((logits - logits.amax(-1, keepdim=True)) / temperature).exp().nan_to_num(0.0)
    order = None
    if any(s.top_p < 1 for s in samplings):
        weights, order = _nucleus(weights, top_p)
    cumulative = weights.double().cumsum(-1)  # float32 would round the tail of a large vocabulary away
    uniform = torch.tensor([s.rng.random() for s in sequences], dtype=torch.float64, device=logits.device)
    picked = torch.searchsorted(cumulative, (uniform * cumulative[:, -1]).unsqueeze(1), right=True)
    picked = picked.clamp_max(weights.shape[-1] - 1)
    return (picked if order is None else order.gather(1, picked)).squeeze(1)


def _nucleus(weights: torch.Tensor, top_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights sorted, zero from where the mass before a token reaches `top_p`, and the tokens they belong to.

    The most likely token always stays, also for top_p = 0.
    """
    whole = weights.double().sum(-1, keepdim=True)
    count = min(_LIKELY, weights.shape[-1])
    best, order = weights.topk(count, dim=-1)
    if ((best.double().sum(-1, keepdim=True) < top_p * whole) & (top_p < 1)).any() or (top_p >= 1).any():
        best, order = weights.sort(dim=-1, descending=True, stable=True)
    before = best.double().cumsum(-1) - best
    cut = (before >= top_p * whole) & (top_p < 1)
    cut[:, 0] = False
    return best.masked_fill(cut, 0.0), order


def _with_logprobs(token: Token | None, logprobs: torch.Tensor, count: int) -> Token | None:
    if token is None:
        return None
    values, ids = logprobs.topk(count)
    best = tuple(map(Logprob, ids.tolist(), values.tolist()))
    return Token(token.id, logprobs[token.id].item(), best)
