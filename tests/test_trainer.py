"""The trainer against PEFT with torch's AdamW: same start, same batches, so the same losses and the same weights."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from adapterhub.base.model import Base
from adapterhub.errors import HubError
from adapterhub.swap import peft
from adapterhub.swap.block import Block
from adapterhub.train.data import Example
from adapterhub.train.plan import Plan, target_layout
from adapterhub.train.trainer import News, Parameters, Progress, Trained, Trainer
from tests.tiny import (
    CPU,
    Machine,
    full_logits,
    greedy,
    prompt_of,
    serving,
    serving_twin,
    stored,
    tiny_model,
)

STEPS = 6


def make_plan(**changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "n_epochs": 100,
        "batch_size": 4,
        "learning_rate_multiplier": 1.0,
        "rank": 3,
        "targets": (),
        "seed": 7,
        "max_steps": STEPS,
    }
    return Plan(**{**fields, **changes})


def make_examples(count: int = 10) -> list[Example]:
    """Longer and shorter than the sliding window of some families; every one has something to learn."""
    choose = random.Random(1)
    examples = []
    for i in range(count):
        tokens = prompt_of(choose.randint(3, 24), 100 + i)
        examples.append(Example(tokens, [choose.random() < 0.5 for _ in tokens[1:]] + [True]))
    return examples


def run(base: Base, plan: Plan, examples: list[Example], micro_tokens: int = 10**6) -> list[News]:
    """Every piece of a job, as the engine does them; the news it told."""
    news: list[News] = []
    trainer = Trainer(base, examples, plan, micro_tokens, news.append)
    try:
        while trainer.step(10**6):
            pass
    except Exception as error:
        trainer.fail(error)
    return news


def block_of(news: list[News]) -> Block:
    assert isinstance(news[-1], Trained), news[-1]
    return news[-1].block


def losses_of(news: list[News]) -> list[float]:
    return [n.loss for n in news if isinstance(n, Progress)]


# -- the oracle


def batches_of(examples: list[Example], plan: Plan, steps: int) -> Iterator[list[Example]]:
    """Every example once an epoch, in an order that the seed decides."""
    order = random.Random(plan.seed)
    while True:
        epoch = order.sample(examples, len(examples))
        for at in range(0, len(epoch), plan.batch_size):
            if steps == 0:
                return
            steps -= 1
            yield epoch[at : at + plan.batch_size]


def oracle(model: PreTrainedModel, base: Base, plan: Plan, examples: list[Example]) -> tuple[PeftModel, list[float]]:
    """PEFT's model, trained example by example with torch's AdamW; and the loss before each step."""
    layout = target_layout(plan, base.layout)
    names = [t.name for t in layout.targets]
    config = LoraConfig(r=plan.rank, lora_alpha=2 * plan.rank, target_modules=names, task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config).eval()
    start = Parameters(layout, plan.rank, plan.scale, plan.seed, CPU)
    for target, factors in layout.all_factors(start.block, plan.rank):
        layer = wrapped.base_model.model.get_submodule(target.name)
        layer.lora_A["default"].weight.data.copy_(factors.a)
        assert not layer.lora_B["default"].weight.any()
    trainable = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=plan.learning_rate, weight_decay=0.0)
    losses, steps = [], plan.steps(len(examples))
    warm = max(1, round(0.1 * steps))
    for step, batch in enumerate(batches_of(examples, plan, steps)):
        share = (step + 1) / warm if step < warm else 1 - 0.9 * (step - warm) / max(1, steps - warm)
        optimizer.param_groups[0]["lr"] = plan.learning_rate * share
        optimizer.zero_grad()
        total, learned = torch.zeros(()), 0
        for example in batch:
            logits = wrapped(input_ids=torch.tensor([example.tokens])).logits[0, :-1]
            mask = torch.tensor(example.learned[1:])
            wanted = torch.tensor(example.tokens[1:])
            total = total + cross_entropy(logits[mask], wanted[mask], reduction="sum")
            learned += int(mask.sum())
        loss = total / learned
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return wrapped, losses


def assert_same_adapter(block: Block, wrapped: PeftModel, **close: float) -> None:
    for target, factors in block.meta.layout.all_factors(block.payload, block.meta.rank):
        layer = wrapped.base_model.model.get_submodule(target.name)
        torch.testing.assert_close(factors.a, layer.lora_A["default"].weight.data, **close)
        torch.testing.assert_close(factors.b, 2 * layer.lora_B["default"].weight.data.T, **close)


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
    base, examples = serving_twin(tiny_model(family)), make_examples()
    taught, losses = oracle(tiny_model(family), base, plan, examples)
    return Lesson(base, run(base, plan, examples), taught, losses)


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
    ],
)
def test_every_hyperparameter_means_what_it_says(changes: dict[str, Any]) -> None:
    lesson = make_lesson("llama", make_plan(**changes))
    torch.testing.assert_close(losses_of(lesson.news), lesson.losses, atol=1e-5, rtol=1e-5)
    assert_same_adapter(lesson.block, lesson.taught, atol=5e-5, rtol=1e-3)


def test_it_learns(lesson: Lesson) -> None:
    news = run(lesson.base, make_plan(learning_rate_multiplier=10.0, max_steps=25), make_examples())
    assert losses_of(news)[-1] < 0.5 * losses_of(news)[0]
    assert all(0 <= n.accuracy <= 1 for n in news if isinstance(n, Progress))


def test_a_seed_gives_the_same_block_and_another_seed_another(lesson: Lesson) -> None:
    again = run(lesson.base, make_plan(), make_examples())
    other = run(lesson.base, make_plan(seed=8), make_examples())
    assert block_of(again).digest == lesson.block.digest
    assert block_of(other).digest != lesson.block.digest


@pytest.mark.parametrize("micro_tokens", [1, 20, 45])
def test_micro_batches_give_the_same_as_one_batch(lesson: Lesson, micro_tokens: int) -> None:
    news = run(lesson.base, make_plan(), make_examples(), micro_tokens)
    torch.testing.assert_close(losses_of(news), losses_of(lesson.news), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(block_of(news).payload, lesson.block.payload, atol=2e-5, rtol=1e-4)


def test_a_piece_is_a_micro_batch(lesson: Lesson) -> None:
    """So that a request waits for no more than that many tokens."""
    news: list[News] = []
    trainer = Trainer(lesson.base, make_examples(), make_plan(max_steps=2), 1, news.append)
    pieces = 0
    while trainer.step(10**6):
        pieces += 1
    assert pieces == 8, "two batches of four examples"


def test_progress_counts_steps_and_tokens(lesson: Lesson) -> None:
    plan, examples = make_plan(), make_examples()
    sizes = [sum(len(e.tokens) for e in batch) for batch in batches_of(examples, plan, STEPS)]
    progress = [n for n in lesson.news if isinstance(n, Progress)]
    assert [(p.step, p.total_steps) for p in progress] == [(i + 1, STEPS) for i in range(STEPS)]
    assert [p.trained_tokens for p in progress] == [sum(sizes[: i + 1]) for i in range(STEPS)]
    assert all(p.tokens_per_second > 0 for p in progress)
    assert progress[-1].seconds_left == 0
    assert isinstance(lesson.news[-1], Trained)
    assert lesson.news[-1].trained_tokens == sum(sizes)


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
    news = run(base, make_plan(learning_rate_multiplier=10.0, max_steps=10), make_examples(4))
    block = block_of(news)
    assert block.payload.dtype == torch.bfloat16
    assert losses_of(news)[-1] < 0.7 * losses_of(news)[0]
    assert list(peft.no_effect(block)) == []


def test_training_leaves_the_base_as_it_was(lesson: Lesson) -> None:
    run(lesson.base, make_plan(max_steps=2), make_examples())
    for (name, found), original in zip(
        lesson.base.model.named_parameters(), tiny_model("llama").parameters(), strict=True
    ):
        assert torch.equal(found, original), name
        assert found.grad is None


# -- how it ends otherwise


def test_a_run_that_diverges_is_told_and_publishes_nothing(lesson: Lesson) -> None:
    news = run(lesson.base, make_plan(learning_rate_multiplier=1e35), make_examples())
    error = news[-1]
    assert isinstance(error, HubError)
    assert error.code == "training_diverged"
    assert "Lower learning_rate_multiplier (it was 1e+35)" in error.message
    assert not any(isinstance(n, Trained) for n in news)


def test_a_cancelled_run_does_and_tells_nothing_more(lesson: Lesson) -> None:
    news: list[News] = []
    trainer = Trainer(lesson.base, make_examples(), make_plan(), 10**6, news.append)
    while not news:
        assert trainer.step(10**6)
    trainer.cancel()
    assert not trainer.step(10**6)
    assert not trainer.step(10**6)
    assert len(news) == 1


# -- beside serving


def test_a_job_trains_the_same_while_the_base_serves_and_its_adapter_is_live_at_once(
    lesson: Lesson, tmp_path: Path
) -> None:
    news: list[News] = []
    prompt, plain = prompt_of(30), greedy(tiny_model("llama"), prompt_of(30), 30)
    with serving(lesson.base, tmp_path, serve_share=0.3) as client:
        client.engine.set_idle_work(Trainer(lesson.base, make_examples(), make_plan(), 30, news.append))
        turns = 0
        while not (news and isinstance(news[-1], Trained)):
            assert client.ask(prompt, max_tokens=30) == plain
            turns += 1
            assert turns < 200
        torch.testing.assert_close(block_of(news).payload, lesson.block.payload, atol=2e-5, rtol=1e-4)
        ref = stored(block_of(news), tmp_path / "blobs")
        assert client.ask(prompt, ref, max_tokens=30) == greedy(lesson.taught, prompt, 30)


def test_a_job_that_diverges_does_not_disturb_the_others(lesson: Lesson, tmp_path: Path) -> None:
    news: list[News] = []
    with serving(lesson.base, tmp_path) as client:
        plan = make_plan(learning_rate_multiplier=1e35)
        client.engine.set_idle_work(Trainer(lesson.base, make_examples(), plan, 30, news.append))
        for _ in range(100):
            client.ask(prompt_of(5))
            if news and isinstance(news[-1], HubError):
                break
        assert isinstance(news[-1], HubError)
        assert news[-1].code == "training_diverged"
        assert client.ask(prompt_of(5)) == greedy(tiny_model("llama"), prompt_of(5), 8)


def test_the_first_steps_warm_up_and_the_rest_fall() -> None:
    """A tenth of the steps rises in a line to the full rate, the others fall in a line to a tenth of it."""
    trainer = Trainer(serving_twin(tiny_model("llama")), make_examples(), make_plan(max_steps=40), 1, lambda _: None)
    rates = [trainer._learning_rate(step) for step in range(41)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert math.isclose(rates[40], 0.1)
    assert all(later < sooner for sooner, later in pairwise(rates[4:]))
