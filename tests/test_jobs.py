"""Jobs from their creation to a live model, beside requests and beside one another, and every way they can end."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import openai
import pytest

from adapterhub.base.model import Base
from adapterhub.train.plan import make_plan, target_layout
from tests.serving import BASE, Server, User, chat_lines, eventually, running, small_config

FOREVER = {"n_epochs": 100, "batch_size": 1}  # with 200 lines 20,000 steps: for as long as a test may take


def messages(user: User, job: str) -> list[str]:
    """What the events of a job say, the oldest first."""
    return [e.message for e in user.openai.fine_tuning.jobs.list_events(job, limit=100)][::-1]


def cancel(user: User, job: str) -> Any:
    return user.openai.fine_tuning.jobs.cancel(job)


@pytest.fixture
def busy(server: Server, user: User) -> Any:
    """A job that runs until the test has ended."""
    job = user.train(chat_lines(200), suffix="busy", **FOREVER)
    user.job(job, "running")
    yield job
    if user.openai.fine_tuning.jobs.retrieve(job).status == "running":
        cancel(user, job)


# -- the plan


def test_left_to_us_small_data_is_repeated_and_large_data_is_not(llama: Base) -> None:
    plans = {n: make_plan({}, 1, n, llama.layout) for n in (10, 40, 1000, 100_000)}
    assert {n: (p.n_epochs, p.batch_size, p.steps(n)) for n, p in plans.items()} == {
        10: (12, 4, 36),
        40: (6, 4, 60),
        1000: (2, 5, 400),
        100_000: (2, 8, 25_000),
    }


def test_what_is_asked_for_is_used_and_auto_or_null_is_left_to_us(llama: Base) -> None:
    asked = {"n_epochs": 3.0, "batch_size": "auto", "learning_rate_multiplier": 0.5, "rank": 4, "max_steps": None}
    plan = make_plan({**asked, "targets": ["v_proj", "q_proj", "q_proj"]}, 9, 10, llama.layout)
    assert plan.hyperparameters == {
        "n_epochs": 3,
        "batch_size": 4,
        "learning_rate_multiplier": 0.5,
        "rank": 4,
        "targets": ["q_proj", "v_proj"],
        "max_steps": None,
    }
    assert plan.seed == 9
    assert {t.name.rpartition(".")[2] for t in target_layout(plan, llama.layout).targets} == {"q_proj", "v_proj"}
    assert make_plan(plan.hyperparameters, 9, 10, llama.layout) == plan, "what is shown can be asked for again"


def test_max_steps_ends_a_training_early_and_never_makes_it_longer(llama: Base) -> None:
    assert make_plan({"max_steps": 5}, 1, 10, llama.layout).steps(10) == 5
    assert make_plan({"max_steps": 10**6}, 1, 10, llama.layout).steps(10) == 36


# -- a life


def test_a_job_tells_its_life_in_openais_words_and_its_model_is_live_at_once(server: Server, user: User) -> None:
    line = [{"role": "user", "content": "Say 3"}, {"role": "assistant", "content": "Aye"}]
    tokens = 12 * len(server.hub.codec.encode(server.hub.codec.render(line, reply=False))) + 2  # of 10 and 11
    job = user.job(user.train(chat_lines(), suffix="mine"), "succeeded")
    assert user.ask(job.fine_tuned_model, "Say 3") == user.ask(f"{user.owner}/mine", "Say 3") == "Aye"
    assert user.ask(BASE, "Say 3") != "Aye"
    said = messages(user, job.id)
    steps = [m for m in said if m.startswith("Step ")]
    assert [m for m in said if m not in steps] == [
        f"Created fine-tuning job: {job.id}",
        f"Validating training file: {job.training_file}",
        f"12 examples, {tokens} tokens; 36 steps in 12 epoch(s) with batch size 4",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        f"New fine-tuned model created: {job.fine_tuned_model}",
        "The job has successfully completed",
    ]
    assert all(re.fullmatch(rf"Step {i}/36: training loss=\d+\.\d\d", m) for i, m in enumerate(steps, start=1))
    assert len(steps) == 36
    assert said.index(steps[0]) == 5
    assert (job.trained_tokens, job.estimated_finish, job.error) == (12 * tokens, None, None)


def test_progress_comes_as_metrics_and_the_loss_falls(user: User) -> None:
    job = user.job(user.train(chat_lines()), "succeeded")
    events = user.openai.fine_tuning.jobs.list_events(job.id, limit=100).data[::-1]
    assert {e.level for e in events} == {"info"}
    metrics: list[Any] = [e.data for e in events if e.type == "metrics"]
    assert [e.data for e in events if e.type == "message"] == [None] * 7
    assert [m["step"] for m in metrics] == list(range(1, 37))
    assert {m["total_steps"] for m in metrics} == {36}
    assert metrics[-1]["train_loss"] < metrics[0]["train_loss"] / 10
    assert metrics[-1]["train_mean_token_accuracy"] == 1 > metrics[0]["train_mean_token_accuracy"]
    assert [m["trained_tokens"] for m in metrics] == sorted(m["trained_tokens"] for m in metrics)
    assert metrics[-1]["trained_tokens"] == job.trained_tokens
    assert metrics[-1]["seconds_left"] == 0
    assert all(m["tokens_per_second"] > 0 for m in metrics)


def test_a_running_job_says_when_it_will_be_done(user: User, busy: str) -> None:
    def look() -> Any:
        job = user.openai.fine_tuning.jobs.retrieve(busy)
        return job if job.estimated_finish else None

    job = eventually(look)
    assert job.status == "running"
    assert job.created_at <= job.estimated_finish < job.created_at + 3600
    assert job.trained_tokens > 0
    assert job.finished_at is None
    ended = cancel(user, busy)
    assert ended.estimated_finish is None


def test_the_same_seed_and_data_make_the_same_model(user: User) -> None:
    jobs = [user.job(user.train(chat_lines(), n_epochs=1), "succeeded") for _ in range(2)]
    digests = {a["versions"][0]["digest"] for a in user.http.get("/v1/adapters").json()["data"]}
    assert len(digests) == 1
    assert jobs[0].fine_tuned_model != jobs[1].fine_tuned_model


def test_retraining_a_name_makes_its_second_version(user: User) -> None:
    first = user.job(user.train(chat_lines(), suffix="mine"), "succeeded")
    second = user.job(user.train(chat_lines(answer="Well"), suffix="mine"), "succeeded")
    [adapter] = user.http.get("/v1/adapters").json()["data"]
    assert [(v["number"], v["model"], v["origin"]) for v in adapter["versions"]] == [
        (2, second.fine_tuned_model, second.id),
        (1, first.fine_tuned_model, first.id),
    ]
    for model, said in ((f"{user.owner}/mine", "Well"), (second.fine_tuned_model, "Well")):
        assert user.ask(model, "Say 3") == said
    assert user.ask(first.fine_tuned_model, "Say 3") == "Aye"


def test_two_owners_jobs_make_a_model_for_each(server: Server) -> None:
    users = [server.user(), server.user()]
    answers = ("Aye", "Well")
    jobs = [u.train(chat_lines(answer=a), suffix="same") for u, a in zip(users, answers, strict=True)]
    models = [u.job(j, "succeeded").fine_tuned_model for u, j in zip(users, jobs, strict=True)]
    assert tuple(u.ask(f"{u.owner}/same", "Say 3") for u in users) == answers
    for user, model, others in zip(users, models, models[::-1], strict=True):
        assert [m.id for m in user.openai.models.list()] == [BASE, f"{user.owner}/same", model]
        with pytest.raises(openai.NotFoundError):
            user.ask(others)


# -- beside requests


def test_requests_are_answered_while_a_job_runs_and_as_without_it(user: User, busy: str) -> None:
    def trained() -> int:
        return user.openai.fine_tuning.jobs.retrieve(busy).trained_tokens or 0

    eventually(trained)
    during = user.ask(BASE, max_tokens=40)
    stream = user.openai.chat.completions.create(
        model=BASE, messages=[{"role": "user", "content": "Hello there"}], max_tokens=40, temperature=0, stream=True
    )
    assert "".join(c.choices[0].delta.content or "" for c in stream) == during
    assert user.openai.fine_tuning.jobs.retrieve(busy).status == "running"
    seen = trained()
    eventually(lambda: trained() > seen)
    cancel(user, busy)
    assert user.ask(BASE, max_tokens=40) == during


# -- cancelling


def test_a_job_that_waits_can_be_cancelled_and_the_others_do_not_notice(user: User, busy: str) -> None:
    waiting = user.train(chat_lines())
    user.job(waiting, "queued")
    ended = cancel(user, waiting)
    assert ended.status == "cancelled"
    assert ended.finished_at is not None
    assert messages(user, waiting)[-1] == "The job was cancelled"
    assert user.openai.fine_tuning.jobs.retrieve(busy).status == "running"
    cancel(user, busy)
    user.job(user.train(chat_lines(), n_epochs=1), "succeeded")
    assert user.openai.fine_tuning.jobs.retrieve(waiting).status == "cancelled"
    assert "Fine-tuning job started" not in messages(user, waiting)


def test_a_running_job_can_be_cancelled_and_the_next_one_runs(server: Server, user: User, busy: str) -> None:
    after = user.train(chat_lines(), n_epochs=1)
    assert cancel(user, busy).status == "cancelled"
    user.job(after, "succeeded")
    job = user.openai.fine_tuning.jobs.retrieve(busy)
    assert (job.status, job.fine_tuned_model) == ("cancelled", None)
    assert [m.id for m in user.openai.models.list() if "busy" in m.id] == []
    eventually(lambda: server.engine_stats()["training"]["runs"] == 0)
    said = messages(user, busy)
    assert said[-1] == "The job was cancelled", "and nothing more"


def test_jobs_that_are_cancelled_at_any_moment_never_stop_the_next(server: Server, user: User) -> None:
    file = user.upload(chat_lines())
    jobs = user.openai.fine_tuning.jobs
    made = []
    for pause in range(12):
        job = jobs.create(model=BASE, training_file=file, hyperparameters={"n_epochs": 1}, seed=pause)
        for _ in range(pause):  # each look takes a few milliseconds
            jobs.retrieve(job.id)
        answer = user.http.post(f"/v1/fine_tuning/jobs/{job.id}/cancel").json()
        assert answer.get("status") == "cancelled" or answer["error"]["code"] == "invalid_status"
        made.append(job.id)
    user.job(user.train(chat_lines(), suffix="last", n_epochs=1), "succeeded")
    ended = [jobs.retrieve(job) for job in made]
    assert {j.status for j in ended} <= {"cancelled", "succeeded"}
    eventually(lambda: server.engine_stats()["training"]["runs"] == 0)
    published = {m.id for m in user.openai.models.list() if m.id.startswith("ft:") and ":last:" not in m.id}
    assert published == {j.fine_tuned_model for j in ended if j.status == "succeeded"}


def test_a_job_that_has_ended_cannot_be_cancelled(user: User) -> None:
    done = user.job(user.train(chat_lines(), n_epochs=1), "succeeded")
    failed = user.job(user.train(chat_lines(1)), "failed")
    for job in (done, failed):
        with pytest.raises(openai.BadRequestError, match=f"already {job.status}") as refused:
            cancel(user, job.id)
        assert refused.value.code == "invalid_status"
        assert user.openai.fine_tuning.jobs.retrieve(job.id) == job


# -- failing


def test_a_file_deleted_before_its_job_runs_fails_the_job(user: User, busy: str) -> None:
    waiting = user.train(chat_lines())
    user.job(waiting, "queued")
    file = user.openai.fine_tuning.jobs.retrieve(waiting).training_file
    user.openai.files.delete(file)
    cancel(user, busy)
    job = user.job(waiting, "failed")
    assert job.error is not None
    assert (job.error.code, job.error.param) == ("invalid_training_file", "training_file")
    assert f"{file} was deleted" in job.error.message


def test_a_file_deleted_while_its_job_runs_does_no_harm(user: User) -> None:
    job = user.train(chat_lines(), batch_size=1)
    user.job(job, "running", "succeeded")
    user.openai.files.delete(user.openai.fine_tuning.jobs.retrieve(job).training_file)
    user.job(job, "succeeded")


def test_a_training_that_diverges_never_publishes_what_is_not_finite(user: User) -> None:
    job = user.job(user.train(chat_lines(), suffix="wild", learning_rate_multiplier=100, batch_size=1, n_epochs=10))
    if job.status == "succeeded":
        assert user.ask(job.fine_tuned_model)
    else:
        assert job.error.code == "training_diverged"


def test_a_training_that_diverges_says_what_to_lower_and_the_next_one_runs(
    base_directory: Path, tmp_path: Path
) -> None:
    """Half precision overflows soon."""
    with running(small_config(base_directory, tmp_path, dtype="float16")) as server:
        user = server.user()
        job = user.job(user.train(chat_lines(), suffix="wild", learning_rate_multiplier=100, batch_size=1), "failed")
        assert job.error.code == "training_diverged"
        assert "Lower learning_rate_multiplier (it was 100)" in job.error.message
        assert messages(user, job.id)[-1] == job.error.message
        assert [m.id for m in user.openai.models.list()] == [BASE]
        assert user.job(user.train(chat_lines(), suffix="tame", n_epochs=1), "succeeded")


def test_long_examples_are_cut_with_a_warning(user: User) -> None:
    content = chat_lines() + chat_lines(1, answer="word " * 600) + chat_lines(1).replace(b"Say", b"word " * 600)
    job = user.job(user.train(content, max_steps=1), "succeeded")
    [warning] = [e for e in user.openai.fine_tuning.jobs.list_events(job.id) if e.level == "warn"]
    assert warning.message == (
        "2 example(s) were longer than 512 tokens and were cut; 1 of them had nothing left to learn and were dropped"
    )


def test_a_full_disk_fails_what_runs_and_nothing_after_there_is_room_again(
    base_directory: Path, tmp_path: Path
) -> None:
    """SQLite is told that the file may not grow: what it then says is what it says of a full disk."""

    def allow(pages: int) -> None:
        with server.hub.database.transaction() as db:
            db.execute(f"pragma max_page_count = {pages}")

    with running(small_config(base_directory, tmp_path)) as server:
        user = server.user()
        job = user.train(chat_lines(200), **FOREVER)
        user.job(job, "running")
        file = user.upload(chat_lines())
        allow(1)  # no less than what it has
        eventually(lambda: server.engine_stats()["training"]["runs"] == 0, seconds=15)
        large = {"model": BASE, "training_file": file, "metadata": {str(i): "x" * 512 for i in range(16)}}
        answer = eventually(lambda: (a := user.http.post("/v1/fine_tuning/jobs", json=large)).is_error and a)
        assert answer.status_code == 507
        assert answer.json()["error"]["code"] == "storage_full"
        assert user.ask(BASE), "requests need no disk"
        allow(1_000_000)
        user.job(user.train(chat_lines(), suffix="after", n_epochs=1), "succeeded")
        assert user.ask(f"{user.owner}/after")
