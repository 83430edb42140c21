"""Chooses the next token of every row of a step, all rows together; and says how likely tokens of prompts were."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import embedding

from adapterhub.base.grammar import masks
from adapterhub.base.request import Logprob, Token
from adapterhub.base.scheduler import Sequence

_COLDEST = 1e-30  # a temperature below is taken for this one, which is greedy as well
_LIKELY = 512  # tokens that nearly always hold the mass of top_p; else so many times more are sorted, and again
_MORE = 8
_RUN = 256  # weights that are added up together


def sample(logits: torch.Tensor, sequences: Seq[Sequence], end_tokens: frozenset[int]) -> list[Token | None]:
    """logits [n, vocabulary], which are changed -> a token for each of the n sequences; None for a row whose numbers
    are not finite.

    A row is drawn by inverting its cumulative distribution at one uniform number from its own generator, so that a
    seed gives the same answer whatever else is in the batch and on whatever device.
    """
    if not sequences:
        return []
    # first: on a GPU, the forward is under way meanwhile
    barred, changes = _barred(sequences, end_tokens), _changes(sequences, end_tokens)
    logits = logits.float()
    asked = [i for i, s in enumerate(sequences) if s.request.sampling.logprobs is not None]
    plain = logits[asked].log_softmax(-1) if asked else None
    if barred is not None:
        _bar(logits, *barred)
    if changes.rows:
        _change(logits, changes)
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


def score(logits: torch.Tensor, rows: Seq[tuple[Sequence, int]]) -> list[Token | None]:
    """logits [n, vocabulary] of n rows, each a sequence and a place in its prompt -> the token that follows there, with
    the log probabilities that are asked for; None for a row whose numbers are not finite."""
    if not rows:
        return []
    logprobs = logits.float().log_softmax(-1)
    tokens = [sequence.tokens[place + 1] for sequence, place in rows]
    counts = [sequence.request.sampling.prompt_logprobs or 0 for sequence, _ in rows]
    values = logprobs.gather(1, torch.tensor(tokens, device=logits.device).unsqueeze(1)).squeeze(1).tolist()
    best, ids = (part.tolist() for part in logprobs.topk(max(counts)))
    return [
        Token(token, value, tuple(map(Logprob, ids[i][:count], best[i][:count]))) if math.isfinite(value) else None
        for i, (token, value, count) in enumerate(zip(tokens, values, counts, strict=True))
    ]


def _barred(sequences: Seq[Sequence], end_tokens: frozenset[int]) -> tuple[list[int], torch.Tensor] | None:
    """The rows whose answers follow a grammar, and one bit per token of what may not come next: [rows, bytes].

    `ignore_eos` and `min_tokens` hold back the end as long as something else may come.
    """
    rows = [i for i, s in enumerate(sequences) if s.matcher is not None]
    if not rows:
        return None
    allowed = masks([matcher for s in sequences if (matcher := s.matcher) is not None])
    for may, row in zip(allowed, rows, strict=True):
        sampling = sequences[row].request.sampling
        if sampling.ignore_eos or sequences[row].produced < sampling.min_tokens:
            going_on = may.copy()
            for token in end_tokens:
                going_on[token >> 3] &= ~(1 << (token & 7)) & 0xFF
            if going_on.any():
                may[:] = going_on
    return rows, torch.from_numpy(~allowed)


def _bar(logits: torch.Tensor, rows: list[int], barred: torch.Tensor) -> None:
    """Makes the barred tokens impossible, in place. Adds, so that a number that is not finite stays one."""
    bits = torch.arange(256, device=logits.device).unsqueeze(1) >> torch.arange(8, device=logits.device)
    infinite = torch.zeros(256, 8, device=logits.device).masked_fill_((bits & 1).bool(), float("-inf"))
    added = embedding(barred.to(logits.device, torch.int), infinite).view(len(rows), -1)[:, : logits.shape[1]]
    if len(rows) == len(logits):
        logits += added
    else:
        logits.index_add_(0, torch.tensor(rows, device=logits.device), added)


class _Changes(NamedTuple):
    """`added` to the logits of `tokens` in `rows`, place by place; no place is named twice."""

    rows: list[int]
    tokens: list[int]
    added: list[float]


def _changes(sequences: Seq[Sequence], end_tokens: frozenset[int]) -> _Changes:
    """Penalties, bias, and no early end: what they are for all rows that have any."""
    changes = _Changes([], [], [])
    for row, sequence in enumerate(sequences):
        if wanted := _wanted(sequence, end_tokens):
            changes.rows.extend([row] * len(wanted))
            changes.tokens.extend(wanted)
            changes.added.extend(wanted.values())
    return changes


def _wanted(sequence: Sequence, end_tokens: frozenset[int]) -> dict[int, float]:
    """Of one row, by token."""
    sampling, wanted = sequence.request.sampling, dict[int, float]()
    if sampling.frequency_penalty or sampling.presence_penalty:
        often, once = sampling.frequency_penalty, sampling.presence_penalty
        wanted = {token: -(often * times + once) for token, times in sequence.counts.items()}
    for token, bias in sampling.logit_bias.items():
        wanted[token] = wanted.get(token, 0.0) + bias
    if sequence.produced < sampling.min_tokens and sequence.matcher is None:
        wanted.update(dict.fromkeys(end_tokens, -math.inf))
    return wanted


def _change(logits: torch.Tensor, changes: _Changes) -> None:
    """In place. Adds, as `_bar` does."""
    device = logits.device
    rows, tokens = (torch.tensor(each, device=device) for each in (changes.rows, changes.tokens))
    logits[rows, tokens] += torch.tensor(changes.added, dtype=logits.dtype, device=device)


def _draw(logits: torch.Tensor, sequences: Seq[Sequence]) -> torch.Tensor:
    samplings = [s.request.sampling for s in sequences]
    temperature = torch.tensor([s.temperature for s in samplings], device=logits.device).clamp_min(_COLDEST)
    top_p = torch.tensor([s.top_p for s in samplings], device=logits.device)
    uniform = torch.tensor([s.draw() for s in sequences], dtype=torch.float64, device=logits.device)
    # without the maximum taken off first, a temperature near zero would make every logit infinite
    below = logits - logits.amax(-1, keepdim=True)
    weights = (below / temperature.unsqueeze(1)).exp().nan_to_num(0.0)
    picked = torch.empty(len(weights), dtype=torch.long, device=logits.device)
    # each row goes the way it would go alone: a token depends on the order in which the weights are added up
    narrow = top_p < 1
    if not narrow.all():
        picked[~narrow] = _invert(weights[~narrow], uniform[~narrow])
    if narrow.any():
        likely = min(_LIKELY, weights.shape[-1])
        picked[narrow] = _draw_from_nucleus(weights[narrow], top_p[narrow], uniform[narrow], likely)
    return picked


def _draw_from_nucleus(weights: torch.Tensor, top_p: torch.Tensor, uniform: torch.Tensor, likely: int) -> torch.Tensor:
    """Draws from the most likely tokens, up to where the mass before a token reaches `top_p`; the first always stays.

    Only the `likely` best are sorted, and more for the rows where these are not enough.
    """
    mass = top_p * weights.double().sum(-1)
    best, order = weights.topk(likely, dim=-1)
    before = best.double().cumsum(-1) - best
    cut = before >= mass.unsqueeze(1)
    cut[:, 0] = False
    picked = order.gather(1, _invert(best.masked_fill(cut, 0.0), uniform).unsqueeze(1)).squeeze(1)
    short = best.double().sum(-1) < mass
    if likely < weights.shape[-1] and short.any():
        more = min(_MORE * likely, weights.shape[-1])
        picked[short] = _draw_from_nucleus(weights[short], top_p[short], uniform[short], more)
    return picked


def _invert(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """weights [n, m], uniform [n] in [0, 1) -> [n] where the cumulative distribution of each row passes its number."""
    # in two levels, the sums of runs and then one run: float32 would round the tail of a large vocabulary away, and to
    # add up whole rows in float64 takes as long as several layers of the model
    parts = nn.functional.pad(weights, (0, -weights.shape[-1] % _RUN)).unflatten(-1, (-1, _RUN))
    run, rest = _pass(parts.sum(-1, dtype=torch.float64), uniform)
    inner, _ = _pass(parts[torch.arange(len(parts), device=run.device), run].double(), rest)
    return run * _RUN + inner


def _pass(weights: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weights [n, m] -> [n] the first place where the cumulative distribution of each row passes its number, always one
    with a weight; and how far it is through that place's weight, in [0, 1)."""
    cumulative = weights.cumsum(-1)
    wanted = (uniform * cumulative[:, -1]).unsqueeze(1)
    last = (cumulative < cumulative[:, -1:]).sum(-1, keepdim=True)  # the last place with a weight
    place = torch.minimum(torch.searchsorted(cumulative, wanted, right=True), last)
    weight = weights.gather(1, place)
    through = (wanted - cumulative.gather(1, place) + weight) / weight
    return place.squeeze(1), through.squeeze(1).clamp(0, 1 - 1e-12)


def _with_logprobs(token: Token | None, logprobs: torch.Tensor, count: int) -> Token | None:
    if token is None:
        return None
    values, ids = logprobs.topk(count)
    best = tuple(map(Logprob, ids.tolist(), values.tolist()))
    return Token(token.id, logprobs[token.id].item(), best)
