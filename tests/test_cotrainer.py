"""Runs side by side, interrupted, evaluated, stopped early, gone on from: each as if it were alone and undisturbed."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from adapterhub.base.batch import Batch, Span
from adapterhub.base.idle import PieceAbandoned
from adapterhub.base.model import Base
from adapterhub.errors import HubError, ServerFault
from adapterhub.swap import peft
from adapterhub.swap.block import Block
from adapterhub.train.cotrainer import CoTrainer
from adapterhub.train.dataset import Example, Kind
from adapterhub.train.news import Checkpoint, News, Progress, Saved, Started, Trained
from adapterhub.train.plan import Plan
from adapterhub.train.run import Run
from adapterhub.train.state import CopyRoom, RunState
from tests.test_trainer import (
    all_of,
    block_of,
    carry_out,
    losses_of,
    make_items,
    make_pairs,
    make_plan,
    run,
    trained,
)
from tests.tiny import data_set, greedy, prompt_of, serving_twin, tiny_model

PLANS = {
    "small": make_plan(rank=1, targets=("q_proj", "v_proj"), batch_size=2),
    "large": make_plan(rank=8, learning_rate=5e-3, lora_plus_ratio=4.0, max_steps=9),
    "preferences": make_plan(kind=Kind.DPO, beta=0.2, batch_size=3),
    "short": make_plan(max_steps=2, seed=3),
}


@pytest.fixture(scope="module")
def base() -> Base:
    return serving_twin(tiny_model("llama"))


def items_of(name: str) -> list[Any]:
    make = make_pairs if PLANS[name].kind is Kind.DPO else make_items
    return make(start=1000 * (1 + list(PLANS).index(name)))


def run_of(base: Base, name: str, news: list[News], **more: Any) -> Run:
    return Run(base, PLANS[name], data_set(items_of(name)), None, news.append, **more)


def assert_same(found: list[News], expected: list[News]) -> None:
    torch.testing.assert_close(losses_of(found), losses_of(expected), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(block_of(found).payload, block_of(expected).payload, atol=5e-5, rtol=1e-3)


# -- together


@pytest.mark.parametrize("tokens", [1, 30, 100, 10**6])
def test_jobs_that_train_together_end_where_each_would_have_ended_alone(base: Base, tokens: int) -> None:
    told: dict[str, list[News]] = {name: [] for name in PLANS}
    trainer = CoTrainer(base, lambda: None)
    for name, news in told.items():
        trainer.add(run_of(base, name, news))
    carry_out(trainer, tokens)
    for name, news in told.items():
        assert_same(news, run(base, PLANS[name], items_of(name)))
    assert trainer.running == 0


def test_one_that_joins_later_changes_nothing_for_the_others(base: Base) -> None:
    first: list[News] = []
    second: list[News] = []
    trainer = CoTrainer(base, lambda: None)
    trainer.add(run_of(base, "large", first))
    for _ in range(5):
        trainer.step(40)
    trainer.add(run_of(base, "small", second))
    carry_out(trainer, 40)
    assert_same(first, run(base, PLANS["large"], items_of("large")))
    assert_same(second, run(base, PLANS["small"], items_of("small")))


def test_a_piece_holds_no_more_than_its_tokens_however_many_jobs_there_are(base: Base) -> None:
    trainer = CoTrainer(base, lambda: None)
    for name in ("small", "large", "short"):
        trainer.add(run_of(base, name, []))
    while done := trainer.step(60):
        assert done <= 60


def test_of_two_jobs_one_of_twice_the_weight_has_twice_the_tokens(base: Base) -> None:
    plan = make_plan(max_steps=60, batch_size=8)
    told: list[list[News]] = [[], []]
    trainer = CoTrainer(base, lambda: None)
    for weight, news in zip((1.0, 2.0), told, strict=True):
        trainer.add(Run(base, plan, data_set(make_items(40)), None, news.append), weight)
    while not all_of(Trained, told[1]):
        trainer.step(30)
    slow, fast = (all_of(Progress, news)[-1].trained_tokens for news in told)
    assert 0.45 < slow / fast < 0.55


def test_a_job_that_fails_fails_alone(base: Base) -> None:
    """One with a token that the base does not have, which breaks the forward of all that are in it."""
    bad: list[News] = []
    good: list[News] = []
    diverging: list[News] = []
    broken = make_items(start=5)
    broken[3][0].tokens[1] = 10**6
    trainer = CoTrainer(base, lambda: None)
    trainer.add(run_of(base, "large", good))
    trainer.add(Run(base, make_plan(), data_set(broken), None, bad.append))
    trainer.add(Run(base, make_plan(learning_rate_multiplier=1e35), data_set(make_items()), None, diverging.append))
    carry_out(trainer, 10**6)
    assert isinstance(bad[-1], ServerFault)
    assert isinstance(diverging[-1], HubError)
    assert diverging[-1].code == "training_diverged"
    assert_same(good, run(base, PLANS["large"], items_of("large")))


def test_it_is_woken_for_what_is_added_and_taken_out(base: Base) -> None:
    woken: list[int] = []
    trainer = CoTrainer(base, lambda: woken.append(1))
    held = run_of(base, "small", [])
    assert trainer.step(10) == 0
    trainer.add(held)
    trainer.take_out(held, save=False)
    assert len(woken) == 2
    assert trainer.step(10) == 0


# -- interrupted


@pytest.mark.parametrize("name", list(PLANS))
@pytest.mark.parametrize("pieces", [0, 1, 4, 11])
def test_what_was_taken_out_goes_on_from_its_snapshot_as_if_nothing_had_happened(
    base: Base, name: str, pieces: int, tmp_path: Path
) -> None:
    before: list[News] = []
    trainer = CoTrainer(base, lambda: None)
    interrupted = run_of(base, name, before)
    trainer.add(interrupted)
    for _ in range(pieces):
        trainer.step(35)
    trainer.take_out(interrupted, save=True)
    assert trainer.step(35) == 0
    told = len(before)
    assert trainer.step(35) == 0
    assert len(before) == told, "nothing more is told"
    whole = run(base, PLANS[name], items_of(name), 35)
    if before and isinstance(before[-1], Trained):
        return  # it had ended before that
    last = before[-1]
    assert isinstance(last, Saved)
    assert last.last
    last.snapshot.save(tmp_path / "state.safetensors")
    state = RunState.load(tmp_path / "state.safetensors")
    after = run(base, PLANS[name], items_of(name), 35, state=state)
    assert all_of(Started, after) == [Started(last.snapshot.step, all_of(Started, whole)[0].total_steps)]
    assert [p.step for p in all_of(Progress, before + after)] == [p.step for p in all_of(Progress, whole)]
    torch.testing.assert_close(losses_of(before) + losses_of(after), losses_of(whole), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(block_of(after).payload, block_of(whole).payload, atol=1e-6, rtol=1e-6)
    assert trained(after).trained_tokens == trained(whole).trained_tokens


def test_a_snapshot_goes_on_with_what_early_stopping_knows(base: Base) -> None:
    plan = make_plan(early_stopping=2, n_epochs=8, max_steps=None, learning_rate=0.05)
    how: dict[str, Any] = {"valid": make_items(6, start=900)}
    whole = run(base, plan, make_items(), **how)
    for saved in all_of(Saved, whole):
        after = run(base, plan, make_items(), state=saved.snapshot, **how)
        assert torch.equal(block_of(after).payload, block_of(whole).payload)
        assert trained(after).step == trained(whole).step


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_a_damaged_state_is_refused_with_words(base: Base, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "state.safetensors"
    [saved, *_] = all_of(Saved, run(base, make_plan(n_epochs=3, max_steps=None), make_items()))
    saved.snapshot.save(path)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-100], "empty": b"", "other": whole}[damage])
    with pytest.raises(ServerFault, match="state") as error:
        run(base, make_plan(rank=7), make_items(), state=RunState.load(path))
    assert error.value.code == "training_state_damaged"


def test_to_write_a_state_takes_no_memory_and_makes_a_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    tensors = {
        "best": torch.arange(7).bfloat16(),
        "block": torch.arange(2 * 1024**2, dtype=torch.float32),
        "a.step": torch.tensor(3.0),
    }
    tracemalloc.start()
    RunState(3, tensors, {"step": 3}).save(path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1024**2
    found = RunState.load(path)
    assert (found.step, found.facts) == (3, {"step": 3})
    for read in (found.tensors, load_file(path)):
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_states_that_nobody_has_written_yet_hold_up_others_but_no_training(base: Base) -> None:
    plan = make_plan(n_epochs=6, max_steps=None, batch_size=10)
    waiting, saved = list[Saved](), list[int]()

    def tell(news: News) -> None:
        if isinstance(news, Saved):
            waiting.append(news)
            saved.append(news.snapshot.step)
        if isinstance(news, Progress) and news.step == 4:
            waiting.clear()

    trainer = CoTrainer(base, lambda: None)
    trainer.add(Run(base, plan, data_set(make_items()), None, tell, copies=CopyRoom(1)))
    carry_out(trainer)
    assert saved == [1, 4], "a state is due after each of five steps"


# -- measured


def test_every_evaluation_is_the_mean_over_the_held_out_tokens(base: Base) -> None:
    valid = make_items(5, start=700)
    news = run(base, make_plan(n_epochs=3, max_steps=None), make_items(), 40, valid=valid)
    found = {p.step: p.valid for p in all_of(Progress, news)}
    assert [step for step, v in found.items() if v] == [3, 6, 9]
    assert all_of(Checkpoint, news)[0].metrics["full_valid_loss"] == found[3].loss
    # a run of one step with a rate of almost nothing is the base
    still = trained(run(base, make_plan(max_steps=1, learning_rate=1e-8), make_items(), valid=valid)).proof
    proof = trained(news).proof
    assert proof.base is not None
    assert still.trained is not None
    assert math.isclose(proof.base.loss, still.trained.loss, rel_tol=1e-4)
    assert proof.trained == found[9]
    assert proof.held_out


def test_without_held_out_data_the_proof_is_on_what_was_learned(base: Base) -> None:
    proof = trained(run(base, make_plan(max_steps=30, learning_rate=1e-2), make_items())).proof
    assert proof.usable
    assert proof.beats_base
    assert not proof.held_out


def test_what_is_worse_than_the_base_on_held_out_data_does_not_beat_it(base: Base) -> None:
    said = [[*prompt_of(4, n), *greedy(tiny_model("llama"), prompt_of(4, n), 12)] for n in range(8)]
    valid = [(Example(np.array(tokens, np.int32), np.arange(len(tokens)) >= 4),) for tokens in said]
    proof = trained(run(base, make_plan(max_steps=40, learning_rate=5e-2), make_items(), valid=valid)).proof
    assert proof.usable
    assert not proof.beats_base, "the held-out data are what the base says by itself"


def test_what_has_no_effect_is_not_usable(base: Base) -> None:
    news = run(base, make_plan(max_steps=1, learning_rate=1e-8, learning_rate_multiplier=0.0), make_items())
    assert not trained(news).proof.has_effect


def test_preferences_are_learned_and_told_apart(base: Base) -> None:
    plan = make_plan(kind=Kind.DPO, beta=0.3, max_steps=40, learning_rate=1e-2)
    news = run(base, plan, make_pairs())
    assert math.isclose(losses_of(news)[0], math.log(2), rel_tol=1e-4)
    assert losses_of(news)[-1] < 0.3
    assert all_of(Progress, news)[-1].accuracy > 0.8
    assert trained(news).proof.beats_base


# -- checkpoints and early stopping


def test_a_checkpoint_is_the_adapter_at_the_end_of_an_epoch(base: Base) -> None:
    news = run(base, make_plan(n_epochs=3, max_steps=None), make_items())
    taken = all_of(Checkpoint, news)
    assert [c.step for c in taken] == [3, 6]
    steps = [n.step for n in news if isinstance(n, Progress | Checkpoint)]
    assert steps == sorted(steps)
    shorter = all_of(Checkpoint, run(base, make_plan(n_epochs=3, max_steps=None, keep_checkpoints=0), make_items()))
    assert shorter == []
    assert not torch.equal(taken[0].block.payload, taken[1].block.payload)
    assert taken[0].metrics["train_loss"] == losses_of(news)[2]


@pytest.mark.parametrize("valid", [None, make_items(4, start=900)], ids=["nothing held out", "held out"])
def test_what_a_step_has_broken_is_no_checkpoint_and_those_before_it_are(
    base: Base, valid: list[Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Plan, "learning_rate_at", lambda _, step, steps: 1e35 if step == 4 else 1e-3)
    news = run(base, make_plan(n_epochs=8, max_steps=None, batch_size=10), make_items(), valid=valid)
    error = news[-1]
    assert isinstance(error, HubError)
    assert error.code == "training_diverged"
    assert "The loss is not finite after step 5" in error.message
    taken = all_of(Checkpoint, news)
    assert [c.step for c in taken] == [1, 2, 3, 4]
    assert all(c.block.payload.isfinite().all() for c in taken)
    assert [p.step for p in all_of(Progress, news)] == ([1, 2, 3, 4, 5] if valid is None else [1, 2, 3, 4])
    assert all(math.isfinite(c.metrics["train_loss"]) for c in taken)


@pytest.mark.parametrize("valid", [None, make_items(4, start=900)], ids=["nothing held out", "held out"])
def test_a_checkpoint_is_told_once_wherever_the_run_is_interrupted(base: Base, valid: list[Any] | None) -> None:
    plan, held_out = make_plan(n_epochs=4, max_steps=None, batch_size=10), data_set(valid) if valid else None
    whole = all_of(Checkpoint, run(base, plan, make_items(), valid=valid))
    assert [c.step for c in whole] == [1, 2, 3]
    for pieces in range(1, 9):
        told: list[News] = []
        trainer = CoTrainer(base, lambda: None)
        interrupted = Run(base, plan, data_set(make_items()), held_out, told.append)
        trainer.add(interrupted)
        for _ in range(pieces):
            trainer.step(10**6)
        trainer.take_out(interrupted, save=True)
        trainer.step(1)
        if isinstance(told[-1], Saved):
            trainer.add(Run(base, plan, data_set(make_items()), held_out, told.append, state=told[-1].snapshot))
            carry_out(trainer)
        taken = all_of(Checkpoint, told)
        assert [c.step for c in taken] == [1, 2, 3], pieces
        for checkpoint, undisturbed in zip(taken, whole, strict=True):
            assert torch.equal(checkpoint.block.payload, undisturbed.block.payload)
            assert checkpoint.metrics == pytest.approx(undisturbed.metrics)


@pytest.mark.parametrize(
    ("plan", "items", "expected"),
    [
        (make_plan(n_epochs=1, max_steps=None, batch_size=1), 40, [10, 20, 30]),
        (make_plan(n_epochs=1, max_steps=None), 8, [1]),
        (make_plan(n_epochs=1, max_steps=None), 4, []),
        (make_plan(n_epochs=20, max_steps=None), 8, [6, 12, 18, 24, 30, 36]),
        (make_plan(n_epochs=20, max_steps=5), 8, [2, 4]),
    ],
)
def test_checkpoints_are_few_and_at_the_ends_of_epochs(plan: Plan, items: int, expected: list[int]) -> None:
    assert plan.checkpoint_steps(items) == expected


def test_early_stopping_ends_a_run_that_gets_no_better_and_keeps_its_best(base: Base) -> None:
    plan = make_plan(early_stopping=2, n_epochs=8, max_steps=None, learning_rate=0.05)
    news = run(base, plan, make_items(), valid=make_items(6, start=900))
    found = {p.step: p.valid.loss for p in all_of(Progress, news) if p.valid}
    best = min(found, key=lambda step: found[step])
    end = trained(news)
    assert end.stopped_early
    assert end.step == best
    assert max(found) < plan.steps(10)
    [checkpoint] = [c for c in all_of(Checkpoint, news) if c.step == best]
    assert torch.equal(end.block.payload, checkpoint.block.payload)
    assert end.proof.trained is not None
    assert end.proof.trained.loss == found[best]


# -- what it costs


def test_what_training_costs_is_known_before_the_first_run(base: Base) -> None:
    trainer = CoTrainer(base, lambda: None)
    assert not trainer.costs.known
    trainer.try_out()
    assert trainer.step(10**6) == 0, "it is nobody's training"
    assert 0 < trainer.costs.seconds(64) <= trainer.costs.seconds(256)
    assert all(p.grad is None for p in base.model.parameters())


def test_what_others_do_with_the_device_in_the_middle_of_a_piece_is_no_cost_of_it(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def serve() -> None:
        nonlocal now
        now += 100

    monkeypatch.setattr("adapterhub.train.cotrainer.perf_counter", lambda: now)
    trainer = CoTrainer(base, lambda: None)
    trainer.try_out()
    trainer.add(run_of(base, "short", []))
    while trainer.step(10**6, serve):
        pass
    assert now > 1000
    assert trainer.costs.known
    assert trainer.costs.seconds(64) == 0


def test_a_trial_that_has_no_memory_is_given_up_and_runs_train(base: Base) -> None:
    def short() -> None:
        raise PieceAbandoned("requests need it")

    trainer, news = CoTrainer(base, lambda: None), list[News]()
    trainer.try_out()
    assert trainer.step(10**6, short) == 0
    assert not trainer.costs.known
    trainer.add(run_of(base, "short", news))
    carry_out(trainer)
    assert trained(news)
    assert trainer.costs.known


# -- from an adapter


def test_going_on_from_an_adapter_starts_with_what_it_knows(base: Base) -> None:
    plan = make_plan(max_steps=30, learning_rate=1e-2)
    first = run(base, plan, make_items())
    again = run(base, make_plan(max_steps=10), make_items(), initial=block_of(first))
    assert losses_of(again)[0] < 1.3 * losses_of(first)[-1]
    assert block_of(again).meta == block_of(first).meta
    assert not torch.equal(block_of(again).payload, block_of(first).payload)


def test_the_proof_compares_with_what_was_gone_on_from_on_the_same_data(base: Base) -> None:
    plan, known, new = make_plan(max_steps=40, learning_rate=1e-2), make_items(), make_items(start=300)
    first = trained(run(base, plan, known, valid=known))
    assert first.proof.initial is None
    assert first.proof.no_worse
    assert first.proof.trained is not None
    for items, no_worse in ((known, True), (new, False)):
        proof = trained(run(base, plan, items, valid=known, initial=first.block)).proof
        assert proof.initial is not None
        assert proof.initial.loss == pytest.approx(first.proof.trained.loss, rel=1e-4)
        assert proof.no_worse is no_worse


def test_an_adapter_of_other_ranks_and_scales_can_be_gone_on_from(base: Base) -> None:
    first = block_of(run(base, make_plan(max_steps=20, learning_rate=1e-2), make_items()))
    files = peft.export_files(first)
    config = peft.read_config(files[peft.CONFIG_FILE])
    config["alpha_pattern"] = {"q_proj": 1.5}
    mixed = peft.encode(config, files[peft.WEIGHTS_FILE], base.layout, base.fingerprint, base.dtype)
    news = run(base, make_plan(max_steps=1, learning_rate=1e-8), make_items(), initial=mixed)
    plain = Block(mixed.meta, mixed.payload)
    torch.testing.assert_close(block_of(news).payload, plain.payload, atol=1e-6, rtol=1e-5)
    assert block_of(news).meta == plain.meta


# -- giving way


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_forwards_of_others_in_the_middle_of_one_change_neither(family: str) -> None:
    """Between any two layers, forward and backward: what the base says to others, and what is learned, is as ever."""
    base = serving_twin(tiny_model(family))
    prompt = torch.tensor(prompt_of(7))
    batch = Batch(prompt, torch.arange(7), [Span(0, 7, 7)], [])
    asked = 0

    def ask() -> torch.Tensor:
        with torch.no_grad():
            return base.logits(batch, torch.arange(7))

    expected = ask()

    def give_way() -> None:
        nonlocal asked
        asked += 1
        assert torch.equal(ask(), expected)

    plan = make_plan(max_steps=2)
    disturbed: list[News] = []
    trainer = CoTrainer(base, lambda: None)
    trainer.add(Run(base, plan, data_set(make_items()), None, disturbed.append))
    while trainer.step(50, give_way):
        pass
    assert asked > 20
    assert torch.equal(block_of(disturbed).payload, block_of(run(base, plan, make_items(), 50)).payload)
