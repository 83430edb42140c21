"""Training by Triton's kernels, in its interpreter on a CPU: against autograd in fp32, and against the torch path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, PreTrainedConfig

pytest.importorskip("triton")

from adapterhub.base import runner
from adapterhub.base.batch import Forward as Laid
from adapterhub.base.batch import Segment, Span
from adapterhub.base.inject import merge
from adapterhub.base.kv import KVCache
from adapterhub.base.model import Base, prepare_base
from adapterhub.base.triton.capture import Watch
from adapterhub.base.triton.learning import LearningBatches
from adapterhub.swap.layout import Layout, Target
from adapterhub.train import packing
from adapterhub.train.cotrainer import CoTrainer
from adapterhub.train.dataset import Example, Kind
from adapterhub.train.news import News, Trained
from adapterhub.train.packing import Forward, Item
from adapterhub.train.parameters import Parameters
from adapterhub.train.run import Run
from tests.kernels import (
    LEARNING_CASES,
    TOLERANCES,
    LearningCase,
    far_learning_error,
    forward_of,
    in_pool,
    jobs_of,
    layout_of,
    learned_by_kernels,
    learning_error,
)
from tests.test_trainer import block_of, losses_of, make_items, make_pairs, make_plan
from tests.test_triton import CLOSE, on_kernels
from tests.tiny import (
    CPU,
    GROUPED,
    VOCABULARY,
    data_set,
    greedy,
    make_ref,
    peft_model,
    prompt_of,
    serving,
    tiny_model,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ONE_LAYER = LlamaConfig(**{**GROUPED, "num_hidden_layers": 1})
Part = tuple[Parameters | None, list[Item]]


# -- the kernels


@pytest.mark.parametrize("case", LEARNING_CASES, ids=str)
def test_outputs_and_gradients_are_those_of_autograd(case: LearningCase) -> None:
    assert learning_error(case, FP16, CPU) <= TOLERANCES[FP16]


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_the_same_in_other_dtypes(dtype: torch.dtype) -> None:
    assert learning_error(LEARNING_CASES[1], dtype, CPU) <= TOLERANCES[dtype]


@pytest.mark.filterwarnings("ignore:invalid value")  # of what is no number
def test_a_jobs_numbers_are_the_same_bit_for_bit_whatever_is_beside_it() -> None:
    """Its rows of y and of x's gradient, and its own gradients, also where another job is not a number."""
    case = LearningCase(((0, 3), (3, 70), (71, 80)), (8, 17, 64), 2100, (72, 24))
    layout = layout_of(case)

    def run(present: list[int], broken: int | None = None) -> tuple[list[torch.Tensor], list[Parameters]]:
        jobs = jobs_of(case, layout, FP32, CPU)
        if broken is not None:
            jobs[broken].factors["0"].b[0, 0] = torch.nan
            jobs[broken].factors["1"].a[0, 0] = torch.inf
        chosen = case._replace(jobs=tuple(case.jobs[i] for i in present))
        y, x_gradient, *_ = learned_by_kernels(chosen, layout, [jobs[i] for i in present], FP32)
        return [y, x_gradient], jobs

    together, jobs = run([0, 1, 2], broken=1)
    assert not jobs[1].gradient.isfinite().all()
    for i in (0, 2):
        alone, again = run([i])
        rows = slice(*case.jobs[i])
        assert torch.equal(again[i].gradient, jobs[i].gradient)
        assert all(torch.equal(a[rows], b[rows]) for a, b in zip(alone, together, strict=True))


def test_jobs_may_lie_further_from_each_other_than_32_bits_count() -> None:
    assert far_learning_error(CPU) <= TOLERANCES[FP16]


def test_a_job_that_is_laid_in_two_places_is_refused() -> None:
    layout = Layout((Target("0", 8, 8),))
    job = Parameters(layout, 2, 1.0, FP32, CPU)
    laid = Laid([0] * 4, [0] * 4, [], [0], [Span(0, 4, 4)], [Segment(0, 1, job), Segment(2, 4, job)])
    with pytest.raises(ValueError, match="lay its rows side by side"):
        LearningBatches(layout, CPU).batch(laid, record=True, give_way=None)


# -- whole models


@pytest.fixture
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes as on a GPU."""
    monkeypatch.setattr(packing, "usable", lambda device: True)


def base_of(family: str | PreTrainedConfig, dtype: torch.dtype = FP32) -> Base:
    base = prepare_base("tiny", tiny_model(family).to(dtype), None, CPU)
    merge(base.model, base.groups)
    return base


def parameters(base: Base, rank: int, names: list[str], seed: int) -> Parameters:
    made = Parameters(base.layout.subset(names), rank, 2.0, base.dtype, base.device)
    made.block.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
    made.refresh()
    return made


def item(length: int, seed: int) -> Item:
    chooser = np.random.default_rng((length, seed))
    return (Example(chooser.integers(3, VOCABULARY, length), np.arange(length) > 0),)


def mixed(base: Base) -> list[Part]:
    """Ranks, targets and lengths of all kinds, with rows of no adapter between them."""
    names = [target.name for target in base.layout.targets]
    return [
        (parameters(base, 16, names, seed=1), [item(50, 0), item(33, 1)]),
        (None, [item(21, 2)]),
        (parameters(base, 5, names[1::2], seed=2), [item(7, 3)]),
        (parameters(base, 64, names[2:], seed=3), [item(2, 4), item(6, 5)]),
    ]


def learn(base: Base, parts: list[Part]) -> list[torch.Tensor]:
    """Log probabilities of all learned tokens, and the gradients of every adapter for a loss that weighs them."""
    forward = Forward(base)
    logprobs = torch.cat([o.logprobs for o in forward(parts, record=True)])
    forward.backward(-(logprobs * torch.linspace(0.5, 1.5, len(logprobs))).sum())
    return [logprobs.detach(), *(p.gradient.clone() for p, _ in parts if p is not None)]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt_neox", "phi"])
def test_a_piece_of_training_is_what_the_torch_path_makes_of_it(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of(family)
    expected = learn(base, mixed(base))
    monkeypatch.setattr(packing, "usable", lambda device: True)
    for found, right in zip(learn(base, mixed(base)), expected, strict=True):
        assert error(found, right) < 1e-5


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_base_of_sixteen_bits_learns_what_one_of_32_does(dtype: torch.dtype, with_kernels: None) -> None:
    narrow, wide = base_of("llama", dtype), base_of("llama")
    for found, expected in zip(learn(narrow, mixed(narrow)), learn(wide, mixed(wide)), strict=True):
        assert error(found, expected) < (0.06 if dtype is BF16 else 0.01)


def test_a_quantized_base_learns_linear_by_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    from adapterhub.base.quantize import Precision

    base = prepare_base("tiny", tiny_model(ONE_LAYER), None, CPU, Precision.INT8)
    expected = learn(base, mixed(base))
    monkeypatch.setattr(packing, "usable", lambda device: True)
    for found, right in zip(learn(base, mixed(base)), expected, strict=True):
        assert error(found, right) < 1e-5


def test_nothing_in_a_piece_waits_for_the_device(with_kernels: None) -> None:
    """But for what the loss is made of, the host never looks at a tensor's numbers, forward or backward."""
    base = base_of(ONE_LAYER)
    with Watch() as watch:
        learn(base, mixed(base))
    assert watch.looked <= {"nonzero"}


def test_linears_that_no_job_learns_cost_nothing(with_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from adapterhub.base.triton import tiles

    base, calls = base_of(ONE_LAYER), []
    names = [target.name for target in base.layout.targets]
    inner = tiles.shrink_back
    monkeypatch.setattr(tiles, "shrink_back", lambda *args: calls.append(args[3].first) or inner(*args))
    learn(base, [(parameters(base, 2, [names[2], names[-1]], seed=1), [item(5, 0)])])
    assert calls == [6, 0]  # down; q, k and v, of which one is learned


@pytest.mark.parametrize("make", [make_items, make_pairs])
def test_jobs_end_where_the_torch_path_ends_though_others_are_served_between_any_two_layers(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of(ONE_LAYER)
    plans = [make_plan(max_steps=2, batch_size=2, rank=rank) for rank in (3, 17)]
    if make is make_pairs:
        plans = [make_plan(max_steps=2, batch_size=2, rank=3, kind=Kind.DPO, beta=0.2)]
    pool = torch.zeros(1 << 16)
    stranger = in_pool(pool, 0, base.layout, base.layout, 5, seed=9)
    asked = 0

    def ask() -> torch.Tensor:
        kv = KVCache(base.kv_shapes, 1 << 18, FP32, CPU)
        laid = forward_of([9, 1, 3], [9, 1, 3], [stranger, None, stranger])
        with torch.no_grad():
            batch = on_kernels(base, kv, pool, laid)
            assert batch.tables is not None
            return base.logits(batch, batch.tables.wanted)

    expected = ask()

    def give_way() -> None:
        nonlocal asked
        asked += 1
        assert torch.equal(ask(), expected)

    def train(between: Callable[[], None]) -> list[list[News]]:
        told: list[list[News]] = [[] for _ in plans]
        trainer = CoTrainer(base, lambda: None)
        for i, (plan, news) in enumerate(zip(plans, told, strict=True)):
            trainer.add(Run(base, plan, data_set(make(4, start=50 * i)), None, news.append))
        while trainer.step(10**6, between):
            pass
        return told

    by_torch = train(lambda: None)
    monkeypatch.setattr(packing, "usable", lambda device: True)
    disturbed = train(give_way)
    assert asked > 10
    for found, right in zip(disturbed, by_torch, strict=True):
        torch.testing.assert_close(losses_of(found), losses_of(right), atol=2e-5, rtol=1e-4)
        assert torch.allclose(block_of(found).payload, block_of(right).payload, **CLOSE)


def test_an_engine_serves_and_trains_on_the_kernels_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, model, plan = base_of(ONE_LAYER), tiny_model(ONE_LAYER), make_plan(max_steps=2, batch_size=2)
    ref = make_ref(model, base, tmp_path, seed=1, r=4)
    prompt, data = prompt_of(5), data_set(make_items(4))
    expected = [greedy(one, prompt, 3) for one in (peft_model(model, seed=1, r=4), model)]

    def job() -> tuple[CoTrainer, list[News]]:
        news: list[News] = []
        trainer = CoTrainer(base, lambda: None)
        trainer.add(Run(base, plan, data, None, news.append))
        return trainer, news

    trainer, by_torch = job()
    while trainer.step(50):
        pass
    monkeypatch.setattr(packing, "usable", lambda device: True)
    monkeypatch.setattr(runner, "usable", lambda device: True)
    trainer, by_kernels = job()
    with serving(base, tmp_path) as client:
        client.engine.set_idle_work(trainer)
        client.engine.wake()
        while not (by_kernels and isinstance(by_kernels[-1], Trained)):
            assert [client.ask(prompt, who, max_tokens=3) for who in (ref, None)] == expected
    assert torch.allclose(block_of(by_kernels).payload, block_of(by_torch).payload, **CLOSE)
