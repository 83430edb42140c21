"""Chooses the next token of every row of a step."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from adapterhub.base.scheduler import Sequence


def sample(logits: torch.Tensor, sequences: Seq[Sequence], end_tokens: frozenset[int]) -> list[int | None]:
    """logits [n, vocabulary] -> a token for each of the n sequences; None where a row has no finite maximum.

    A row is drawn by inverting its cumulative distribution at one uniform number from its own generator, so that a
    seed gives the same answer whatever else is in the batch and on whatever device.
    """
    if not sequences:
        return []
    logits = logits.float()
    _forbid_early_end(logits, sequences, end_tokens)
    best, tokens = logits.max(-1)
    drawn = [i for i, s in enumerate(sequences) if s.request.sampling.temperature > 0]
    if drawn:
        tokens[drawn] = _draw(logits[drawn], [sequences[i] for i in drawn])
    finite = best.isfinite() & ~logits.isnan().any(-1)
    return [token if good else None for token, good in zip(tokens.tolist(), finite.tolist(), strict=True)]


def _forbid_early_end(logits: torch.Tensor, sequences: Seq[Sequence], end_tokens: frozenset[int]) -> None:
    rows = [i for i, s in enumerate(sequences) if s.produced < s.request.sampling.min_tokens]
    if rows and end_tokens:
        logits[torch.tensor(rows).unsqueeze(1), torch.tensor(sorted(end_tokens))] = float("-inf")


def _draw(logits: torch.Tensor, sequences: Seq[Sequence]) -> torch.Tensor:
    samplings = [s.request.sampling for s in sequences]
    temperature = torch.tensor([s.temperature for s in samplings], device=logits.device)
    top_p = torch.tensor([s.top_p for s in samplings], device=logits.device)
    # float32 would round the tail of a large vocabulary's cumulative sum away
    probabilities = (logits / temperature.unsqueeze(1)).softmax(-1).nan_to_num(0.0).double()
    order = None
    if any(s.top_p < 1 for s in samplings):
        probabilities, order = probabilities.sort(-1, descending=True, stable=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p.unsqueeze(1), 0.0)
        # the most likely token always stays, also for top_p = 0
        probabilities[:, 0] = probabilities[:, 0].clamp_min(torch.finfo(torch.float64).tiny)
    cumulative = probabilities.cumsum(-1)
    uniform = torch.tensor([s.rng.random() for s in sequences], dtype=torch.float64, device=logits.device)
    picked = torch.searchsorted(cumulative, (uniform * cumulative[:, -1]).unsqueeze(1), right=True)
    picked = picked.clamp_max(logits.shape[-1] - 1)
    return (picked if order is None else order.gather(1, picked)).squeeze(1)
