"""The sampler on given logits, against the formulas written out."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adapterhub.base.request import Request, Sampling
from adapterhub.base.sampler import sample
from adapterhub.base.scheduler import Sequence

VOCABULARY = 2000


def make(produced: list[int] | None = None, **sampling: Any) -> Sequence:
    sequence = Sequence.of(Request("", [1, 2], Sampling(**{"temperature": 0.0, **sampling})))
    for token in produced or []:
        sequence.tokens.append(token)
        sequence.counts[token] += 1
    return sequence


def logits_of(rows: int = 1, seed: int = 0, size: float = 1.0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * size


def ids(logits: torch.Tensor, *sequences: Sequence, end: frozenset[int] = frozenset()) -> list[int | None]:
    return [token and token.id for token in sample(logits.clone(), sequences, end)]


def test_nothing_to_sample_is_nothing() -> None:
    assert sample(torch.empty(0, VOCABULARY), [], frozenset()) == []


def test_temperature_zero_takes_the_best() -> None:
    logits = logits_of(3)
    assert ids(logits, make(), make(), make()) == logits.argmax(-1).tolist()


MIXED: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.7, "top_p": 0.9, "seed": 2},
    {"temperature": 1.3, "top_p": 0.9999, "seed": 3},
    {"temperature": 1.0, "top_p": 0.1, "seed": 4, "frequency_penalty": 1.5},
    {"temperature": 1.0, "seed": 5, "logit_bias": {7: 5.0}, "logprobs": 3},
    {"temperature": 1.0, "top_p": 0.0, "seed": 6, "min_tokens": 9},
]


@pytest.mark.parametrize("rounded", [False, True])
def test_a_row_gets_the_same_token_alone_and_among_any_others(rounded: bool) -> None:
    """Also where many logits are equal, as they are in sixteen bits; sharp and flat rows together."""
    for seed in range(6):
        logits = logits_of(len(MIXED), seed) * torch.tensor([5.0, 1, 5, 0.1, 3, 1, 1]).unsqueeze(1)
        if rounded:
            logits = logits.bfloat16().float()
        made = [{**m, "seed": m.get("seed", 0) + 100 * seed} for m in MIXED]
        alone = [ids(logits[i : i + 1], make([3, 3, 9], **m))[0] for i, m in enumerate(made)]
        assert ids(logits, *(make([3, 3, 9], **m) for m in made)) == alone
        backwards = [make([3, 3, 9], **m) for m in reversed(made)]
        assert ids(logits.flip(0), *backwards) == alone[::-1]


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_penalties_bias_and_early_ends_take_the_same_operations_for_any_number_of_rows() -> None:
    asked = {"frequency_penalty": 0.5, "presence_penalty": 0.2, "logit_bias": {7: 5.0, 3: 1.0}, "min_tokens": 9}
    counts = []
    for rows in (1, 20):
        logits, sequences = logits_of(rows), [make([3, 3, 9], **asked) for _ in range(rows)]
        with Operations() as operations:
            sample(logits, sequences, frozenset({0, 1}))
        counts.append(operations.count)
    assert counts[0] == counts[1]


def naive(row: torch.Tensor, sequence: Sequence, end: frozenset[int]) -> int:
    """The formulas, one token after the other, in double precision."""
    sampling, logits = sequence.request.sampling, row.double().tolist()
    for token, times in sequence.counts.items():
        logits[token] -= sampling.frequency_penalty * times + sampling.presence_penalty
    for token, bias in sampling.logit_bias.items():
        logits[token] += bias
    if sequence.produced < sampling.min_tokens:
        for token in end:
            logits[token] = -math.inf
    best = max(range(len(logits)), key=logits.__getitem__)
    if sampling.temperature == 0:
        return best
    weights = [math.exp((logit - logits[best]) / sampling.temperature) for logit in logits]
    order, mass = list(range(len(weights))), sum(weights)
    if sampling.top_p < 1:
        order.sort(key=lambda token: -weights[token])
        before, nucleus = 0.0, []
        for token in order:
            if nucleus and before >= sampling.top_p * mass:
                break
            nucleus.append(token)
            before += weights[token]
        order = nucleus
    drawn = random.Random(sampling.seed).random() * sum(weights[token] for token in order)
    for token in order:
        drawn -= weights[token]
        if drawn < 0:
            return token
    return order[-1]


@pytest.mark.parametrize("vocabulary", [3, 511, 512, 513, 49152])
@pytest.mark.parametrize("size", [0.5, 5.0, 40.0])  # flat, so that the nucleus has most of the tokens; and sharp
def test_every_row_of_a_mixed_batch_is_what_the_formulas_say(vocabulary: int, size: float) -> None:
    """On logits so far apart that rounding does not decide which comes first."""
    choose = random.Random(vocabulary)
    end, rows, sequences = frozenset({1, 2}), [], []
    for i in range(24):
        generator = torch.Generator().manual_seed(i)
        rows.append(torch.randperm(vocabulary, generator=generator) * (size / vocabulary))
        tokens = [choose.randrange(vocabulary) for _ in range(6)]
        sampling: dict[str, Any] = {
            "temperature": choose.choice([0.0, 0.3, 1.0, 2.0]),
            "top_p": choose.choice([0.0, 0.3, 0.9, 0.999, 1.0, 1.0]),
            "seed": i,
            "frequency_penalty": choose.choice([0.0, 1.5, -2.0]),
            "presence_penalty": choose.choice([0.0, 0.7, -1.0]),
            "logit_bias": {token: choose.uniform(-3, 3) for token in tokens[:3]} if choose.random() < 0.4 else {},
            "min_tokens": choose.choice([0, 0, 5, 9]),
            "logprobs": choose.choice([None, 2]),
        }
        sequences.append(make(choose.choices(tokens, k=7), **sampling))
    expected = [naive(row, sequence, end) for row, sequence in zip(rows, sequences, strict=True)]
    assert ids(torch.stack(rows), *sequences, end=end) == expected


def test_a_row_that_is_not_finite_gets_none_and_spoils_no_other() -> None:
    logits = logits_of(5)
    logits[1, 3] = float("nan")
    logits[2, 5] = float("inf")
    logits[3] = float("-inf")
    for sampling in ({}, {"temperature": 1.0, "seed": 1}, {"temperature": 1.0, "top_p": 0.5, "seed": 1, "logprobs": 2}):
        found = ids(logits, *(make(**sampling) for _ in range(5)))
        assert [token is None for token in found] == [False, True, True, True, False]


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-38, 1e-45, 5e-324])
def test_the_coldest_temperatures_are_greedy(temperature: float) -> None:
    logits = logits_of(4)
    sequences = [make(temperature=temperature, seed=i, top_p=p) for i, p in enumerate((1.0, 0.5, 1.0, 0.9))]
    assert ids(logits, *sequences) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.99])
def test_only_the_nucleus_is_drawn_and_all_of_it(flat: bool, top_p: float) -> None:
    """Flat: the nucleus has more tokens than are sorted at first."""
    logits = logits_of(size=0.01 if flat else 4.0)
    probabilities = logits[0].double().softmax(-1)
    ordered, order = probabilities.sort(descending=True)
    nucleus = order[: int((ordered.cumsum(-1) < top_p - 1e-9).sum()) + 1].tolist()
    drawn = set()
    for start in range(0, 500, 100):
        rows = [make(temperature=1.0, top_p=top_p, seed=start + i) for i in range(100)]
        drawn |= set(ids(logits.expand(100, -1), *rows))
    assert drawn <= set(nucleus)
    large = [token for token in nucleus if probabilities[token] / top_p > 0.03]
    assert set(large) <= drawn


def test_penalties_are_taken_off_for_what_was_produced() -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, [5, 6, 7]] = torch.tensor([4.0, 3.0, 2.0])
    produced = [5, 5, 5, 6]
    assert ids(logits, make(produced)) == [5]
    assert ids(logits, make(produced, frequency_penalty=0.6)) == [6]  # 4 - 1.8 < 3 - 0.6
    assert ids(logits, make(produced, presence_penalty=1.5)) == [5]  # 4 - 1.5 > 2
    assert ids(logits, make(produced, frequency_penalty=0.9, presence_penalty=0.5)) == [7]  # 0.8, 1.6, 2
    assert ids(logits, make(produced, frequency_penalty=-1.0)) == [5]
    assert ids(logits, make([], frequency_penalty=2.0, presence_penalty=2.0)) == [5], "the prompt does not count"


def test_a_bias_is_added() -> None:
    logits = logits_of()
    best = logits.argmax().item()
    assert ids(logits, make(logit_bias={11: 100.0})) == [11]
    assert ids(logits, make(logit_bias={best: -100.0})) == [logits[0].topk(2).indices[1].item()]


def test_an_end_is_forbidden_before_min_tokens() -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, [4, 8, 15]] = torch.tensor([9.0, 8.0, 7.0])
    end = frozenset({4, 8})
    assert ids(logits, make([1], min_tokens=1), end=end) == [4]
    assert ids(logits, make([1], min_tokens=2), end=end) == [15]
    drawn = [make([1], min_tokens=2, temperature=1.0, top_p=0.9, seed=i) for i in range(50)]
    assert not {4, 8} & set(ids(logits.expand(50, -1), *drawn, end=end))


def test_logprobs_are_the_models_whatever_changes_the_choice() -> None:
    logits = logits_of(3, size=3.0)
    expected = logits.log_softmax(-1)
    forced = logits[1].argmin().item()
    [greedy, biased, plain] = sample(
        logits.clone(),
        [make(logprobs=4), make(logprobs=0, logit_bias={forced: 100.0}, temperature=0.5, seed=1), make()],
        frozenset(),
    )
    assert greedy is not None
    assert greedy.logprob == pytest.approx(expected[0].max().item(), abs=1e-5)
    values, best = expected[0].topk(4)
    assert [b.token for b in greedy.best] == best.tolist()
    assert [b.logprob for b in greedy.best] == pytest.approx(values.tolist(), abs=1e-5)
    assert biased is not None
    assert (biased.id, biased.best) == (forced, ())
    assert biased.logprob == pytest.approx(expected[1, forced].item(), abs=1e-5)
    assert plain is not None
    assert (plain.logprob, plain.best) == (None, ())


class Lowest(random.Random):
    def random(self) -> float:
        return 0.0


def test_the_smallest_number_drawn_is_not_a_token_that_is_impossible() -> None:
    logits = logits_of()
    logits[0, :9] = float("-inf")
    for top_p in (1.0, 0.5):
        sequence = make(temperature=1.0, top_p=top_p)
        sequence.rng = Lowest()
        assert ids(logits, sequence) == [9 if top_p == 1 else logits[0].argmax().item()]


def test_a_seed_decides_and_its_numbers_go_on() -> None:
    logits = torch.zeros(1, VOCABULARY)
    one, same, other = (make(temperature=1.0, seed=seed) for seed in (1, 1, 2))

    def produce(sequence: Sequence) -> list[int | None]:
        again, found = ids(logits, sequence), ids(logits, sequence)
        assert again == found, "a step that is run again draws the same token"
        assert found[0] is not None
        sequence.append(found[0])
        return found

    first, second = produce(one), produce(one)
    assert [first, second] == [produce(same), produce(same)]
    assert first != second
    assert first != ids(logits, other)
    assert math.isfinite(sum(t for t in (*first, *second) if t is not None))
