"""What a job will train is told before the start, as a count of what its steps will really meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.base.model import Base
from adapterhub.base.share import PieceCosts
from adapterhub.train.dataset import DataSet, Example, Kind
from adapterhub.train.estimate import Estimate, estimate
from adapterhub.train.plan import make_plan


def alike(directory: Path, name: str, items: int, kind: Kind = Kind.SUPERVISED, tokens: int = 10) -> DataSet:
    example = Example(np.arange(tokens, dtype=np.int32), np.ones(tokens, np.bool_))
    return DataSet.of(kind, [(example,) * kind.sides] * items, directory, name)


def costs(piece: float, token: float) -> PieceCosts:
    """Of pieces of up to 256 tokens."""
    made = PieceCosts(256)
    made._largest, made._fixed, made._per_token = 256, piece, token
    return made


@pytest.mark.parametrize("given", [{}, {"n_epochs": 3}, {"max_steps": 5}, {"max_steps": 13, "batch_size": 7}])
def test_the_tokens_of_every_step_are_counted(llama: Base, tmp_path: Path, given: dict[str, Any]) -> None:
    train = alike(tmp_path, "train", 42)
    plan = make_plan(given, 1, len(train), llama.layout, width=32)
    sizes = [min(plan.batch_size, 42 - at) for at in range(0, 42, plan.batch_size)]  # of the batches of an epoch
    trained = sum(sizes[step % len(sizes)] for step in range(plan.steps(42))) * 10
    proof = 2 * 32 * 10  # of what is trained on, before and after: none is held out
    assert estimate(train, None, plan, None, 7) == Estimate(trained, proof, None, 7)
    per_token = estimate(train, None, plan, costs(0.0, 0.01), 7).seconds
    assert per_token == pytest.approx((trained + proof / 3) / 100)


def test_a_step_costs_something_however_few_tokens_it_has(llama: Base, tmp_path: Path) -> None:
    train = alike(tmp_path, "train", 40, tokens=100)
    plan = make_plan({"n_epochs": 3, "batch_size": 10}, 1, 40, llama.layout, width=32)
    tokens, pieces = 12 * 1000 + 6400 / 3, 12 * 4 + 25 / 3  # 12 steps, and what is measured at a third of that
    found = estimate(train, None, plan, costs(0.5, 0.001), 7)
    assert found.seconds == pytest.approx(0.5 * pieces + 0.001 * tokens)


def test_what_is_only_measured_is_counted_too_and_costs_less(llama: Base, tmp_path: Path) -> None:
    train, valid = alike(tmp_path, "train", 80), alike(tmp_path, "valid", 6)
    plan = make_plan({"n_epochs": 4, "batch_size": 8}, 1, 80, llama.layout, width=32, valid_items=6)
    times = len(plan.checkpoint_steps(80)) + 2  # at checkpoints, at the end, and the base alone
    found = estimate(train, valid, plan, costs(0.0, 0.001), 7)
    assert (found.tokens, found.forward_tokens) == (3200, 60 * times)
    assert found.seconds == pytest.approx((3200 + 20 * times) / 1000)
    assert estimate(train, valid, plan, None, 7, going_on=True).forward_tokens == 60 * (times + 1)


@pytest.mark.parametrize("kind", Kind)
def test_no_evaluation_counts_more_items_than_it_takes(llama: Base, tmp_path: Path, kind: Kind) -> None:
    train, valid = alike(tmp_path, "train", 10, kind), alike(tmp_path, "valid", 1000, kind)
    plan = make_plan({}, 1, 10, llama.layout, kind, width=32, valid_items=1000)
    times, references = len(plan.checkpoint_steps(10)) + 1, 100 * kind.sides if kind is Kind.DPO else 0
    found = estimate(train, valid, plan, None, 7)
    assert found.forward_tokens == 256 * 10 * kind.sides * (times + 1) + references  # the base, or the references


def test_preferences_are_counted_with_both_sides_and_their_reference_once(llama: Base, tmp_path: Path) -> None:
    train, valid = (alike(tmp_path, name, n, Kind.DPO) for name, n in (("train", 40), ("valid", 5)))
    plan = make_plan({"n_epochs": 2, "batch_size": 8}, 1, 40, llama.layout, Kind.DPO, width=32, valid_items=5)
    found = estimate(train, valid, plan, None, 7)
    times = len(plan.checkpoint_steps(40)) + 1
    assert (found.tokens, found.forward_tokens) == (2 * 800, 100 * times + 800 + 100)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, ""), (0.2, "1 s"), (75.4, "75 s"), (600, "10.0 min"), (9000, "2.5 h"), (5500, "1.5 h")],
)
def test_the_message_says_it_in_units_that_suit(seconds: float | None, words: str) -> None:
    time = f", about {words} with the device to itself" if words else ""
    assert Estimate(500, 0, seconds, 7).message == f"500 tokens to train{time}"
    assert Estimate(500, 20, seconds, 7).message == f"500 tokens to train and 20 to measure with{time}"
