"""Runs against PEFT with torch's AdamW: same start, same batches, so the same losses and the same weights."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import PreTrainedModel

from adapterhub.base.model import Base
from adapterhub.errors import HubError
from adapterhub.swap import peft
from adapterhub.swap.block import Block
from adapterhub.train.cotrainer import CoTrainer
from adapterhub.train.dataset import Example, Kind
from adapterhub.train.news import News, Progress, Started, Trained
from adapterhub.train.packing import Forward
from adapterhub.train.parameters import Parameters
from adapterhub.train.plan import Plan, Schedule, target_layout
from adapterhub.train.run import Run
from adapterhub.train.work import Work
from tests.tiny import (
    CPU,
    Machine,
    data_set,
    full_logits,
    greedy,
    prompt_of,
    serving,
    serving_twin,
    stored,
    tiny_model,
)

STEPS = 6
Item = tuple[Example, ...]


def make_plan(**changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "kind": Kind.SUPERVISED,
        "n_epochs": 100,
        "batch_size": 4,
        "learning_rate": 2e-3,
        "learning_rate_multiplier": 1.0,
        "schedule": Schedule.LINEAR,
        "rank": 3,
        "alpha": 2.0 * changes.get("rank", 3),
        "rslora": False,
        "lora_plus_ratio": 1.0,
        "targets": (),
        "weight_decay": 0.0,
        "seed": 7,
        "max_steps": STEPS,
        "early_stopping": 0,
        "keep_checkpoints": 3,
        "held_out": None,
    }
    return Plan(**{**fields, **changes})


def make_example(choose: random.Random, number: int, prefix: Sequence[int] = ()) -> Example:
    tokens = [*prefix, *prompt_of(choose.randint(3, 24), number)]
    learned = [len(prefix) <= i and choose.random() < 0.5 for i in range(1, len(tokens))]
    return Example(np.array(tokens, np.int32), np.array([False, *learned[:-1], True]))


def make_items(count: int = 10, start: int = 100) -> list[Item]:
    """Longer and shorter than the sliding window of some families; every one has something to learn."""
    choose = random.Random(start)
    return [(make_example(choose, start + i),) for i in range(count)]


def make_pairs(count: int = 10, start: int = 100) -> list[Item]:
    choose = random.Random(start)
    asked = [prompt_of(choose.randint(2, 9), start + i) for i in range(count)]
    return [
        (make_example(choose, start + 2 * i, prompt), make_example(choose, start + 2 * i + 1, prompt))
        for i, prompt in enumerate(asked)
    ]


def carry_out(trainer: CoTrainer, tokens: int = 10**6) -> int:
    """Every piece there is, as the engine does them; returns how many that were."""
    pieces = 0
    while trainer.step(tokens):
        pieces += 1
    return pieces


def run(base: Base, plan: Plan, items: list[Item], tokens: int = 10**6, **more: Any) -> list[News]:
    """A job by itself; the news it told."""
    news: list[News] = []
    trainer = CoTrainer(base, lambda: None)
    valid = more.pop("valid", None)
    trainer.add(Run(base, plan, data_set(items), data_set(valid) if valid else None, news.append, **more))
    carry_out(trainer, tokens)
    assert trainer.running == 0
    return news


def trained(news: list[News]) -> Trained:
    assert isinstance(news[-1], Trained), news[-1]
    return news[-1]


def block_of(news: list[News]) -> Block:
    return trained(news).block


def losses_of(news: list[News]) -> list[float]:
    return [n.loss for n in news if isinstance(n, Progress)]


def all_of(kind: type, news: list[News]) -> list[Any]:
    return [n for n in news if isinstance(n, kind)]


# -- the oracle


def batches_of(items: list[Item], plan: Plan, steps: int) -> Iterator[list[Item]]:
    """Every item once an epoch, in an order that the seed decides."""
    epoch = 0
    while True:
        order = np.random.default_rng((plan.seed, epoch)).permutation(len(items))
        for at in range(0, len(items), plan.batch_size):
            if steps == 0:
                return
            steps -= 1
            yield [items[i] for i in order[at : at + plan.batch_size]]
        epoch += 1


def logprobs_of(model: Any, example: Example) -> torch.Tensor:
    """Of the tokens to be learned."""
    tokens, mask = torch.from_numpy(example.tokens.astype(np.int64)), torch.from_numpy(example.learned[1:])
    logits = model(input_ids=tokens[None]).logits[0, :-1]
    return -cross_entropy(logits[mask], tokens[1:][mask], reduction="none")


def loss_of(model: PeftModel, batch: list[Item], beta: float | None) -> torch.Tensor:
    if beta is None:
        each = [logprobs_of(model, item[0]) for item in batch]
        return -torch.cat(each).sum() / sum(len(e) for e in each)
    losses = []
    for item in batch:
        better, worse = (logprobs_of(model, side).sum() for side in item)
        with model.disable_adapter(), torch.no_grad():
            base_better, base_worse = (logprobs_of(model, side).sum() for side in item)
        losses.append(-logsigmoid(beta * ((better - base_better) - (worse - base_worse))))
    return torch.stack(losses).mean()


def oracle(model: PreTrainedModel, base: Base, plan: Plan, items: list[Item]) -> tuple[PeftModel, list[float]]:
    """PEFT's model, trained item by item with torch's AdamW; and the loss before each step."""
    layout = target_layout(plan, base.layout)
    names = [t.name for t in layout.targets]
    config = LoraConfig(
        r=plan.rank, lora_alpha=plan.alpha, use_rslora=plan.rslora, target_modules=names, task_type="CAUSAL_LM"
    )
    wrapped = get_peft_model(model, config).eval()
    start = Parameters(layout, plan.rank, plan.scale, torch.float32, CPU)
    start.start_fresh(plan.seed)
    for name, factors in start.factors.items():
        layer = wrapped.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(factors.a)
        assert not layer.lora_B["default"].weight.any()
    halves = [[p for n, p in wrapped.named_parameters() if f"lora_{half}" in n] for half in "AB"]
    optimizer = torch.optim.AdamW([{"params": half} for half in halves], lr=0.0, weight_decay=plan.weight_decay)
    losses, steps = [], plan.steps(len(items))
    warm = max(1, round(0.1 * steps))
    for step, batch in enumerate(batches_of(items, plan, steps)):
        share = (step + 1) / warm if step < warm else 1 - 0.9 * (step - warm) / max(1, steps - warm)
        rate = plan.learning_rate * plan.learning_rate_multiplier * share
        for group, ratio in zip(optimizer.param_groups, (1.0, plan.lora_plus_ratio), strict=True):
            group["lr"] = rate * ratio
        optimizer.zero_grad()
        loss = loss_of(wrapped, batch, plan.beta)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*halves[0], *halves[1]], 1.0)
        optimizer.step()
        losses.append(loss.item())
    return wrapped, losses


def assert_same_adapter(block: Block, wrapped: PeftModel, *, atol: float, rtol: float) -> None:
    scale = block.meta.scales[0]
    for target, factors in block.meta.layout.all_factors(block.payload, block.meta.rank):
        layer = wrapped.base_model.model.get_submodule(target.name)
        torch.testing.assert_close(factors.a, layer.lora_A["default"].weight.data, atol=atol, rtol=rtol)
        torch.testing.assert_close(factors.b, scale * layer.lora_B["default"].weight.data.T, atol=atol, rtol=rtol)


@dataclass
class Lesson:
    """One plan carried out by the trainer, and by PEFT."""

    base: Base
    news: list[News]
    taught: PeftModel
    losses: list[float]

    @property
    def block(self) -> Block:
        return block_of(self.news)


def make_lesson(family: str, plan: Plan) -> Lesson:
    base = serving_twin(tiny_model(family))
    items = make_pairs() if plan.kind is Kind.DPO else make_items()
    taught, losses = oracle(tiny_model(family), base, plan, items)
    return Lesson(base, run(base, plan, items), taught, losses)


@pytest.fixture(scope="module")
def lesson() -> Lesson:
    return make_lesson("llama", make_plan())


# -- the same as PEFT


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma2", "gpt_neox"])
def test_losses_and_weights_are_those_of_peft(family: str) -> None:
    lesson = make_lesson(family, make_plan())
    torch.testing.assert_close(losses_of(lesson.news), lesson.losses, atol=1e-5, rtol=1e-5)
    assert_same_adapter(lesson.block, lesson.taught, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"targets": ("q_proj", "v_proj")},
        {"targets": ("down_proj",), "rank": 1},
        {"max_steps": None, "n_epochs": 2, "batch_size": 3},
        {"max_steps": 1},
        {"learning_rate_multiplier": 10.0, "max_steps": 4},
        {"alpha": 5.0},
        {"rank": 4, "alpha": 3.0, "rslora": True},
        {"lora_plus_ratio": 8.0},
        {"weight_decay": 0.1, "learning_rate": 1e-2},
        {"kind": Kind.DPO, "beta": 0.3},
        {"kind": Kind.DPO, "beta": 0.05, "learning_rate_multiplier": 10.0, "batch_size": 3},
    ],
)
def test_every_hyperparameter_means_what_it_says(changes: dict[str, Any]) -> None:
    lesson = make_lesson("llama", make_plan(**changes))
    torch.testing.assert_close(losses_of(lesson.news), lesson.losses, atol=1e-5, rtol=1e-5)
    assert_same_adapter(lesson.block, lesson.taught, atol=5e-5, rtol=1e-3)


def test_it_learns(lesson: Lesson) -> None:
    news = run(lesson.base, make_plan(learning_rate_multiplier=10.0, max_steps=25), make_items())
    assert losses_of(news)[-1] < 0.5 * losses_of(news)[0]
    assert all(0 <= n.accuracy <= 1 for n in news if isinstance(n, Progress))


def test_a_seed_gives_the_same_block_and_another_seed_another(lesson: Lesson) -> None:
    again = run(lesson.base, make_plan(), make_items())
    other = run(lesson.base, make_plan(seed=8), make_items())
    assert block_of(again).digest == lesson.block.digest
    assert block_of(other).digest != lesson.block.digest


@pytest.mark.parametrize("micro_tokens", [1, 20, 45])
def test_micro_batches_give_the_same_as_one_batch(lesson: Lesson, micro_tokens: int) -> None:
    news = run(lesson.base, make_plan(), make_items(), micro_tokens)
    torch.testing.assert_close(losses_of(news), losses_of(lesson.news), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(block_of(news).payload, lesson.block.payload, atol=2e-5, rtol=1e-4)


def test_a_piece_is_a_micro_batch(lesson: Lesson) -> None:
    """So that a request waits for no more than that many tokens."""
    trainer = CoTrainer(lesson.base, lambda: None)
    trainer.add(Run(lesson.base, make_plan(max_steps=2), data_set(make_items()), None, lambda _: None))
    sizes = [len(item[0].tokens) for batch in batches_of(make_items(), make_plan(), 2) for item in batch]
    measured = sum(len(item[0].tokens) for item in make_items())  # before and after
    assert [trainer.step(10**6), *(trainer.step(1) for _ in sizes)] == [measured, *sizes]
    assert [trainer.step(10**6), trainer.step(10**6)] == [measured, 0]


def test_the_order_of_an_epoch_is_drawn_once(lesson: Lesson, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes as long as the data are many, and serving waits for it."""
    drawn: list[Any] = []
    draw = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: drawn.append(seed) or draw(seed))
    run(lesson.base, make_plan(n_epochs=3, max_steps=None, batch_size=1), make_items())
    assert drawn == [7, (7, 0), (7, 1), (7, 2)], "and what is measured is chosen once"


def test_progress_counts_steps_and_tokens(lesson: Lesson) -> None:
    plan, items = make_plan(), make_items()
    sizes = [sum(len(item[0].tokens) for item in batch) for batch in batches_of(items, plan, STEPS)]
    assert lesson.news[0] == Started(0, STEPS)
    progress = all_of(Progress, lesson.news)
    assert [(p.step, p.total_steps) for p in progress] == [(i + 1, STEPS) for i in range(STEPS)]
    assert [p.trained_tokens for p in progress] == [sum(sizes[: i + 1]) for i in range(STEPS)]
    assert all(p.tokens_per_second > 0 for p in progress)
    assert progress[-1].seconds_left == 0
    assert trained(lesson.news).trained_tokens == sum(sizes)
    assert trained(lesson.news).step == STEPS


# -- what is published


def test_the_published_block_serves_what_was_trained(lesson: Lesson, tmp_path: Path) -> None:
    machine = Machine(lesson.base, tmp_path)
    prompt = prompt_of(20)
    logits = machine.logits(prompt, stored(lesson.block, tmp_path / "blobs"))
    torch.testing.assert_close(logits, full_logits(lesson.taught, prompt), atol=1e-4, rtol=1e-4)
    assert (logits - machine.logits(prompt, None)).abs().max() > 0.01
    machine.tiers.close()


def test_the_export_of_a_trained_block_loads_in_peft(lesson: Lesson, tmp_path: Path) -> None:
    for name, content in peft.export_files(lesson.block).items():
        (tmp_path / name).write_bytes(content)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    prompt = prompt_of(20)
    expected = full_logits(lesson.taught, prompt)
    torch.testing.assert_close(full_logits(loaded, prompt), expected, atol=1e-4, rtol=1e-4)


def test_the_export_of_a_trained_block_can_be_imported_again(lesson: Lesson) -> None:
    files = peft.export_files(lesson.block)
    config = peft.read_config(files[peft.CONFIG_FILE])
    base = lesson.base
    again = peft.encode(config, files[peft.WEIGHTS_FILE], base.layout, base.fingerprint, base.dtype)
    assert torch.equal(again.payload, lesson.block.payload)


def test_a_base_of_sixteen_bits_trains_a_block_of_sixteen_bits() -> None:
    base = serving_twin(tiny_model("llama").bfloat16())
    news = run(base, make_plan(learning_rate_multiplier=10.0, max_steps=10), make_items(4))
    block = block_of(news)
    assert block.payload.dtype == torch.bfloat16
    assert losses_of(news)[-1] < 0.7 * losses_of(news)[0]
    assert list(peft.no_effect(block)) == []


def test_gradients_of_a_float16_base_do_not_vanish_however_many_tokens_their_loss_is_the_mean_of() -> None:
    narrow, wide = (gradient_of(serving_twin(tiny_model("llama").to(d)), 10**6) for d in (torch.float16, torch.float32))
    assert (narrow - wide).norm() < 0.02 * wide.norm()


def gradient_of(base: Base, whole: int) -> torch.Tensor:
    """Of a loss that is the mean over so many tokens, of which these are some."""
    parameters = Parameters(base.layout, 4, 2.0, base.dtype, base.device)
    parameters.block.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    parameters.refresh()
    work, forward = Work(data_set(make_items(4)), range(4), parameters, learn=True), Forward(base)
    work.whole = whole
    taken = [work.take() for _ in range(4)]
    [outcome] = forward([(parameters, [item for _, item in taken])], record=True)
    forward.backward(work.settle([number for number, _ in taken], outcome))
    parameters.finish_gradient(math.inf, work.whole)
    return parameters.gradient


def test_training_leaves_the_base_as_it_was(lesson: Lesson) -> None:
    run(lesson.base, make_plan(max_steps=2), make_items())
    for (name, found), original in zip(
        lesson.base.model.named_parameters(), tiny_model("llama").parameters(), strict=True
    ):
        assert torch.equal(found, original), name
        assert found.grad is None


# -- how it ends otherwise


def test_a_run_that_diverges_is_told_and_publishes_nothing(lesson: Lesson) -> None:
    news = run(lesson.base, make_plan(learning_rate_multiplier=1e35), make_items())
    error = news[-1]
    assert isinstance(error, HubError)
    assert error.code == "training_diverged"
    assert "Lower learning_rate_multiplier (it was 1e+35)" in error.message
    assert not all_of(Trained, news)


def test_a_run_that_explodes_though_its_numbers_stay_finite_is_stopped_too(lesson: Lesson) -> None:
    learned = block_of(run(lesson.base, make_plan(max_steps=60, learning_rate=2e-2), make_items()))
    news = run(lesson.base, make_plan(max_steps=60, learning_rate=2.0), make_items(), initial=learned)
    error = news[-1]
    assert isinstance(error, HubError)
    assert error.code == "training_diverged"
    assert "The loss rose from" in error.message
    assert math.isfinite(losses_of(news)[-1])


def test_a_rise_is_seen_even_if_the_first_batch_was_the_hardest() -> None:
    """What it began with is not what the first batch has said, but what the base says to the very same examples."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight *= 4  # so that the base is sure of what it says
    said = [[*prompt_of(4, n), *greedy(model, prompt_of(4, n), 12)] for n in range(9)]
    items: list[Item] = [(Example(np.array(tokens, np.int32), np.arange(len(tokens)) >= 4),) for tokens in said]
    plan = make_plan(max_steps=60, batch_size=1, learning_rate=0.5)
    items.insert(np.random.default_rng((plan.seed, 0)).permutation(10)[0], make_items(1)[0])
    news = run(serving_twin(model), plan, items)
    assert isinstance(news[-1], HubError)
    assert "The loss rose from" in news[-1].message
    assert losses_of(news)[0] > 10, "the first batch was the hard one"
    assert len(losses_of(news)) < 10


@pytest.mark.parametrize("seed", [1, 4, 5])
def test_hard_batches_after_easy_ones_are_no_divergence(lesson: Lesson, seed: int) -> None:
    """Old and new examples in one file: an adapter that knows half of them goes on, and has not got far yet."""
    [known, *new] = make_items(7)
    learned = block_of(run(lesson.base, make_plan(max_steps=60, learning_rate=2e-2, batch_size=1), [known]))
    plan = make_plan(batch_size=1, max_steps=None, n_epochs=3, learning_rate=1e-4, seed=seed)
    news = run(lesson.base, plan, [known] * 6 + new, initial=learned)
    assert trained(news).step == 36


# -- beside serving


def test_a_job_trains_the_same_while_the_base_serves_and_its_adapter_is_live_at_once(
    lesson: Lesson, tmp_path: Path
) -> None:
    news: list[News] = []
    prompt, plain = prompt_of(30), greedy(tiny_model("llama"), prompt_of(30), 30)
    with serving(lesson.base, tmp_path) as client:
        trainer = CoTrainer(lesson.base, client.engine.wake)
        client.engine.set_idle_work(trainer)
        trainer.add(Run(lesson.base, make_plan(), data_set(make_items()), None, news.append))
        turns = 0
        while not (news and isinstance(news[-1], Trained)):
            assert client.ask(prompt, max_tokens=30) == plain
            turns += 1
            assert turns < 1000
        torch.testing.assert_close(block_of(news).payload, lesson.block.payload, atol=2e-5, rtol=1e-4)
        ref = stored(block_of(news), tmp_path / "blobs")
        assert client.ask(prompt, ref, max_tokens=30) == greedy(lesson.taught, prompt, 30)


def test_a_job_that_diverges_does_not_disturb_the_others(lesson: Lesson, tmp_path: Path) -> None:
    news: list[News] = []
    with serving(lesson.base, tmp_path) as client:
        trainer = CoTrainer(lesson.base, client.engine.wake)
        client.engine.set_idle_work(trainer)
        plan = make_plan(learning_rate_multiplier=1e35)
        trainer.add(Run(lesson.base, plan, data_set(make_items()), None, news.append))
        for _ in range(1000):
            client.ask(prompt_of(5))
            if news and isinstance(news[-1], HubError):
                break
        assert isinstance(news[-1], HubError)
        assert news[-1].code == "training_diverged"
        assert client.ask(prompt_of(5)) == greedy(tiny_model("llama"), prompt_of(5), 8)


# -- the course of the learning rate


@pytest.mark.parametrize(
    ("schedule", "middle", "end"), [("linear", 0.55, 0.1), ("cosine", 0.55, 0.1), ("constant", 1, 1)]
)
def test_the_first_tenth_of_the_steps_warms_up_and_the_rest_follows_the_schedule(
    schedule: str, middle: float, end: float
) -> None:
    plan = make_plan(schedule=Schedule(schedule), learning_rate=0.5, learning_rate_multiplier=2.0)
    rates = [plan.learning_rate_at(step, 40) for step in range(41)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert math.isclose(rates[22], middle)
    assert math.isclose(rates[40], end)
    assert all(later <= sooner for sooner, later in pairwise(rates[4:]))
