"""What is chosen where a job leaves it to us, and what a job may ask for."""

from __future__ import annotations

from typing import Any

import pytest

from adapterhub.base.model import Base
from adapterhub.errors import BadRequest
from adapterhub.swap.block import BlockMeta
from adapterhub.train.dataset import Kind
from adapterhub.train.plan import check_hyperparameters, make_plan
from tests.test_trainer import block_of, make_items, run
from tests.test_trainer import make_plan as plan_of

# -- what is chosen


@pytest.mark.parametrize(
    ("items", "batch_size", "n_epochs", "steps"),
    [(10, 4, 12, 36), (40, 4, 6, 60), (100, 4, 2, 50), (1000, 5, 2, 400), (10_000, 8, 2, 2500)],
)
def test_small_data_is_repeated_and_large_data_comes_in_larger_batches(
    llama: Base, items: int, batch_size: int, n_epochs: int, steps: int
) -> None:
    plan = make_plan({}, 1, items, llama.layout, width=576)
    assert (plan.batch_size, plan.n_epochs, plan.steps(items)) == (batch_size, n_epochs, steps)
    assert (plan.rank, plan.alpha, plan.early_stopping) == (16, 32, 0)
    assert make_plan({}, 1, items, llama.layout, width=576, valid_items=5).early_stopping == 3
    assert make_plan({}, 1, items, llama.layout, Kind.DPO, width=576).n_epochs == min(4, n_epochs)


@pytest.mark.parametrize(
    ("width", "rate"),
    [(32, 2e-3), (576, 2e-3), (960, 1.2e-3), (2048, 5.6e-4), (3584, 3.2e-4), (4096, 2.8e-4), (8192, 1.4e-4)],
)
def test_the_wider_the_base_the_lower_the_learning_rate(llama: Base, width: int, rate: float) -> None:
    assert make_plan({}, 1, 100, llama.layout, width=width).learning_rate == rate
    assert make_plan({}, 1, 100, llama.layout, Kind.DPO, width=width).learning_rate == pytest.approx(rate / 10)
    assert make_plan({"learning_rate": 0.01}, 1, 100, llama.layout, width=width).learning_rate == 0.01


# -- what may be asked for


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("given", [{}, {"rslora": True, "rank": 8}, {"targets": ["v_proj", "q_proj"], "held_out": 0.1}])
def test_what_is_shown_can_be_asked_for_again(llama: Base, given: dict[str, Any], kind: Kind) -> None:
    plan = make_plan(given, 1, 100, llama.layout, kind, width=llama.width)
    check_hyperparameters(plan.hyperparameters, llama.layout, kind)
    assert make_plan(plan.hyperparameters, 1, 100, llama.layout, kind, width=llama.width) == plan


@pytest.fixture(scope="module", params=[{}, {"rslora": True, "alpha": 5.0}, {"targets": ("q_proj",), "rank": 2}])
def initial(request: pytest.FixtureRequest, llama: Base) -> BlockMeta:
    return block_of(run(llama, plan_of(max_steps=1, **request.param), make_items())).meta


def test_what_is_shown_of_a_job_that_goes_on_from_an_adapter_can_be_asked_for_again(
    llama: Base, initial: BlockMeta
) -> None:
    plan = make_plan({}, 1, 100, llama.layout, width=llama.width, initial=initial)
    check_hyperparameters(plan.hyperparameters, llama.layout, initial=initial)
    assert make_plan(plan.hyperparameters, 1, 100, llama.layout, width=llama.width, initial=initial) == plan
    for given in ({"alpha": plan.alpha * 2}, {"rslora": True}, {"rank": 9}, {"targets": ["v_proj"]}):
        with pytest.raises(BadRequest, match="has settled it"):
            check_hyperparameters(given, llama.layout, initial=initial)


def test_what_is_refused_is_repeated_in_part_alone(llama: Base) -> None:
    for given in ({"targets": ["x" * 100_000]}, {"targets": "y" * 100_000}, {"schedule": "z" * 100_000}):
        with pytest.raises(BadRequest) as refused:
            check_hyperparameters(given, llama.layout)
        assert len(refused.value.message) < 500
