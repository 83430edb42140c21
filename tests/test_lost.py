"""A device is lost: nobody waits for ever, and what it trained goes on elsewhere."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub.base.engine import Engine
from adapterhub.base.inbox import Inbox
from adapterhub.base.lost import DeviceLost
from adapterhub.errors import Unavailable
from adapterhub.swap.block import block_path
from adapterhub.swap.policies import Rules
from adapterhub.swap.ref import AdapterRef
from adapterhub.train import starter
from adapterhub.train.cotrainer import CoTrainer
from adapterhub.train.news import Lost, News
from adapterhub.train.run import Run
from tests.scarce import NO_MEMORY
from tests.serving import Server, User, chat_lines, eventually, running, small_config
from tests.test_cotrainer import run_of
from tests.test_fleet import SECONDS, Pair, Town, fail, held_up, lose, make_town, started
from tests.test_jobs import cancel, change, events, losses, messages, trained
from tests.tiny import prompt_of, serving


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Town:
    return make_town(tmp_path_factory.mktemp("lost"))


# -- who waits for an answer

QUESTIONS: list[Callable[[Engine], Future[Any]]] = [
    Engine.stats,
    Engine.check_integrity,
    lambda engine: engine.set_budgets(device=512 * 1024),
    lambda engine: engine.set_rules(Rules()),
    lambda engine: engine.plan(),
    lambda engine: engine.pin("0" * 64, True),
    lambda engine: engine.evict("0" * 64),
    lambda engine: engine.erase("ada"),
    lambda engine: engine.tiers_of([]),
]


def test_whatever_was_asked_of_an_engine_that_ends_is_answered(town: Town) -> None:
    with serving(town.bases[0], town.directory) as client:
        with held_up(client.engine):
            client.engine._inbox.put(fail)
            asked = [question(client.engine) for question in QUESTIONS]
            client.submit("late", prompt_of(4))
        for future in asked:
            assert isinstance(future.exception(SECONDS), Unavailable)
        assert isinstance(client.error("late"), Unavailable)
        for question in QUESTIONS:
            with pytest.raises(Unavailable):
                question(client.engine)


def test_a_change_of_budgets_that_waits_for_a_load_fails_with_the_device(town: Town, tmp_path: Path) -> None:
    pipe = block_path(tmp_path / "blobs", "pipe")
    pipe.parent.mkdir()
    os.mkfifo(pipe)  # which keeps its reader waiting
    with serving(town.bases[0], tmp_path, load_threads=1) as client:
        engine = client.engine
        client.submit("waits", prompt_of(3), AdapterRef("pipe", "pipe", 4))
        eventually(lambda: not engine.tiers.readers_idle)
        changing = engine.set_budgets(device=512 * 1024)
        engine.stats().result(SECONDS)
        assert not changing.done()
        lose(engine)
        assert isinstance(changing.exception(SECONDS), Unavailable)
        assert isinstance(client.error("waits"), Unavailable)
        with pipe.open("wb"):
            pipe.unlink()


def test_what_raises_on_a_lost_device_keeps_nobody_from_hearing_of_it() -> None:
    inbox, done = Inbox(), Future[None]()

    def stumble() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    heard: list[str] = []
    inbox.put(stumble)
    inbox.put(fail)
    inbox.put(lambda: heard.append("a request"))
    inbox.promise(done, stumble)
    inbox.lose(Unavailable("lost"))
    assert heard == ["a request"]
    assert isinstance(done.exception(0), Unavailable)


def test_a_question_that_is_no_longer_wanted_is_not_asked(town: Town) -> None:
    with serving(town.bases[0], town.directory) as client:
        with held_up(client.engine):
            stats = client.engine.stats()
            assert stats.cancel()
        assert client.engine.stats().result(SECONDS)


def test_what_is_asked_of_all_is_answered_by_those_that_live_when_one_is_lost_meanwhile(town: Town) -> None:
    with started(Pair(town)) as pair:
        with held_up(*pair.engines):
            pair.engines[0]._inbox.put(fail)
            changing = pair.fleet.set_budgets(device=512 * 1024)
            stats = pair.fleet.stats()
        changing.result(SECONDS)
        assert [device["alive"] for device in stats.result(SECONDS)["devices"]] == [False, True]
        assert pair.engines[1].budgets.device == 512 * 1024


def test_when_all_are_lost_meanwhile_who_asked_is_told(town: Town) -> None:
    pair = Pair(town)
    pair.fleet.start()
    with held_up(*pair.engines):
        for engine in pair.engines:
            engine._inbox.put(fail)
        asked = [pair.fleet.set_budgets(device=512 * 1024), pair.fleet.stats()]
    for future in asked:
        assert isinstance(future.exception(SECONDS), Unavailable)
    pair.fleet.stop()


# -- what was trained


def test_all_runs_of_a_lost_device_are_told_once(town: Town) -> None:
    told: dict[str, list[News]] = {"small": [], "large": [], "short": []}
    trainer = CoTrainer(town.bases[0], lambda: None)
    runs = {name: run_of(town.bases[0], name, news) for name, news in told.items()}
    trainer.add(runs["small"])
    trainer.step(30)
    trainer.add(runs["large"])  # the engine has not come to it yet
    trainer.take_out(runs["small"], save=True)
    trainer.lose()
    trainer.add(runs["short"])
    trainer.take_out(runs["large"], save=True)
    assert trainer.lost
    assert trainer.running == 0
    assert all(news.count(Lost()) == 1 and news[-1] == Lost() for news in told.values())


def test_a_job_does_not_fail_because_its_device_does(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(device: torch.device) -> None:
        raise DeviceLost(f"{device}: an illegal memory access was encountered")

    news: list[News] = []
    with serving(town.bases[0], town.directory) as client:
        trainer = CoTrainer(town.bases[0], client.engine.wake)
        client.engine.set_idle_work(trainer)
        monkeypatch.setattr("adapterhub.train.cotrainer.check_device", lost)
        monkeypatch.setattr(trainer, "_learn", lambda parts: fail_with(RuntimeError("CUDA error: unspecified")))
        trainer.add(run_of(town.bases[0], "small", news))
        eventually(lambda: not client.engine.alive)
    assert news[-1] == Lost()


def fail_with(error: Exception) -> None:
    raise error


@pytest.fixture
def two(base_directory: Path, tmp_path: Path) -> Iterator[Server]:
    with running(small_config(base_directory, tmp_path, devices=("cpu", "cpu"))) as server:
        yield server


COURSE = {"batch_size": 1, "n_epochs": 4, "early_stopping": 0, "held_out": 0}


def test_a_job_goes_on_on_another_device_from_its_last_state_and_ends_as_if_nothing_had_happened(two: Server) -> None:
    user = two.user()
    undisturbed = user.job(user.train(chat_lines(60), suffix="one", **COURSE), "succeeded")
    job = user.train(chat_lines(60), suffix="other", **COURSE)
    eventually(lambda: trained(user, job) > 80)  # a checkpoint is behind it
    [at] = [index for index, trainer in enumerate(two.hub.trainers) if trainer.running]
    lose(two.hub.engine.engines[at])
    user.job(job, "succeeded")
    [said] = [m for m in messages(user, job, steps=False) if "lost" in m]
    assert said == "The device that trained it is lost: the job goes on after step 60"
    assert losses(user, job) == pytest.approx(losses(user, undisturbed.id), abs=1e-3, rel=1e-3)
    assert user.ask(user.openai.fine_tuning.jobs.retrieve(job).fine_tuned_model)
    user.job(user.train(chat_lines(), max_steps=2, suffix="next"), "succeeded")


def test_a_job_goes_on_elsewhere_even_if_the_database_fails_meanwhile(
    two: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapterhub.train.conductor._PAUSE_SECONDS", 0.05)
    get, failed = two.hub.jobs.get, list[str]()

    def fails_once(owner: str | None, identity: str) -> Any:
        conducting = threading.current_thread().name == "adapterhub-conductor"
        if conducting and not failed and any(trainer.lost for trainer in two.hub.trainers):
            failed.append(identity)
            raise sqlite3.OperationalError("disk I/O error")
        return get(owner, identity)

    monkeypatch.setattr(two.hub.jobs, "get", fails_once)
    user = two.user()
    job = user.train(chat_lines(60), **COURSE)
    eventually(lambda: trained(user, job))
    [at] = [index for index, trainer in enumerate(two.hub.trainers) if trainer.running]
    lose(two.hub.engine.engines[at])
    user.job(job, "succeeded")
    assert failed == [job]


def test_a_job_that_is_paused_as_its_device_is_lost_goes_on_from_its_last_state(two: Server) -> None:
    user = two.user()
    job = user.train(chat_lines(60), **COURSE)
    eventually(lambda: trained(user, job) > 80)
    [at] = [index for index, trainer in enumerate(two.hub.trainers) if trainer.running]
    with held_up(two.hub.engine.engines[at]):
        two.hub.engine.engines[at]._inbox.put(fail)
        assert change(user, job, "pause")["status"] == "paused"
    eventually(lambda: not two.hub.worker.busy([job]))
    assert change(user, job, "resume")["status"] == "queued"
    user.job(job, "succeeded")
    assert "Fine-tuning job goes on after step 60" in messages(user, job, steps=False)


def test_jobs_wait_for_a_restart_when_all_devices_are_lost(base_directory: Path, tmp_path: Path) -> None:
    config = small_config(base_directory, tmp_path, devices=("cpu", "cpu"))
    with running(config) as server:
        user = server.user()
        job = user.train(chat_lines(60), **COURSE)
        eventually(lambda: trained(user, job) > 80)
        for engine in server.hub.engine.engines:
            lose(engine)
        eventually(lambda: any("started again" in e.message for e in events(user, job)))
        later = user.train(chat_lines(), max_steps=1)
        assert user.job(later, "queued").status == "queued"
        assert user.openai.fine_tuning.jobs.retrieve(job).status == "running"
        key = user.key
    with running(config) as server:
        user = User(server.url, user.owner, key)
        user.job(job, "succeeded")
        user.job(later, "succeeded")
        assert "The server restarted: the job goes on after step 60" in messages(user, job, steps=False)


# -- a device that has no room for one more


def test_a_job_for_whose_parameters_there_is_no_memory_waits_until_others_have_left(
    base_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(small_config(base_directory, tmp_path)) as server:
        [trainer] = server.hub.trainers
        tried = threading.Event()

        def one_at_a_time(*arguments: Any, **more: Any) -> Run:
            if trainer.running:
                tried.set()
                raise torch.OutOfMemoryError(NO_MEMORY)
            return Run(*arguments, **more)

        monkeypatch.setattr(starter, "Run", one_at_a_time)
        user = server.user()
        first = user.train(chat_lines(60), n_epochs=50, suffix="first")
        eventually(lambda: trainer.running)
        second = user.train(chat_lines(), max_steps=2, suffix="second")
        assert tried.wait(SECONDS)
        assert user.openai.fine_tuning.jobs.retrieve(second).status == "queued"
        cancel(user, first)
        user.job(second, "succeeded")


def test_a_job_for_whose_parameters_there_is_no_memory_at_all_says_what_to_do(
    base_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(small_config(base_directory, tmp_path)) as server:
        monkeypatch.setattr(starter, "Run", lambda *_, **__: fail_with(torch.OutOfMemoryError(NO_MEMORY)))
        user = server.user()
        job = user.job(user.train(chat_lines(), max_steps=2), "failed")
        assert job.error.code == "out_of_memory"
        assert "lower rank" in job.error.message
