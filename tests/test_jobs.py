"""Jobs from their creation to a live model, beside requests and beside one another, and every way they can end."""

from __future__ import annotations

import csv
import io
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest

from adapterhub.config import MIB
from adapterhub.errors import StorageFull
from adapterhub.swap.versions import Kind
from adapterhub.train.plan import Plan
from adapterhub.train.prepare import prepare
from adapterhub.train.results import FILENAME
from tests.serving import BASE, PeftFiles, Server, User, chat_lines, eventually, running, small_config

# with 200 lines 20,000 steps: for as long as a test may take
FOREVER = {"n_epochs": 100, "batch_size": 1, "early_stopping": 0, "held_out": 0}
SHORT = {"n_epochs": 1}


def events(user: User, job: str) -> list[Any]:
    """The oldest first."""
    return list(user.openai.fine_tuning.jobs.list_events(job, limit=1000))[::-1]


def messages(user: User, job: str, *, steps: bool = True) -> list[str]:
    """What the events of a job say, the oldest first; without `steps` those alone that are no progress."""
    return [e.message for e in events(user, job) if steps or e.type == "message"]


def trained(user: User, job: str) -> int:
    """The last step that the job has told of."""
    return max((e.data["step"] for e in events(user, job) if e.type == "metrics"), default=0)


def losses(user: User, job: str) -> list[float]:
    """Of each step, as the result file says."""
    [file] = user.openai.fine_tuning.jobs.retrieve(job).result_files
    rows = list(csv.DictReader(io.StringIO(user.openai.files.content(file).read().decode())))
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    return [float(row["train_loss"]) for row in rows]


def change(user: User, job: str, what: str) -> dict[str, Any]:
    return user.http.post(f"/v1/fine_tuning/jobs/{job}/{what}").raise_for_status().json()


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


# -- a life


def test_a_job_tells_its_life_in_openais_words_and_its_model_is_live_at_once(server: Server, user: User) -> None:
    line = [{"role": "user", "content": "Say 3"}, {"role": "assistant", "content": "Aye"}]
    tokens = 12 * len(server.hub.codec.encode(server.hub.codec.render(line, reply=False))) + 2  # of 10 and 11
    job = user.job(user.train(chat_lines(), suffix="mine", n_epochs=12, keep_checkpoints=0), "succeeded")
    assert user.ask(job.fine_tuned_model, "Say 3") == user.ask(f"{user.owner}/mine", "Say 3") == "Aye"
    assert user.ask(BASE, "Say 3") != "Aye"
    said = messages(user, job.id)
    steps = [m for m in said if m.startswith("Step ")]
    others = [m for m in said if m not in steps]
    assert others[:2] + others[4:6] + others[7:] == [
        f"Created fine-tuning job: {job.id}",
        f"Validating training file: {job.training_file}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        f"New fine-tuned model created: {job.fine_tuned_model}",
        "The job has successfully completed",
    ]
    assert others[2] == f"Training file: 12 examples, {tokens} tokens, 48 of them to be learned"
    assert others[3].startswith(f"36 steps in 12 epoch(s) with batch size 4: {12 * tokens} tokens to train")
    assert re.fullmatch(
        r"Checked before publishing: a loss of \d+\.\d{3} on examples it was trained on, the base's is \d+\.\d{3}",
        others[6],
    )
    assert all(m.startswith(f"Step {i}/36: training loss=") for i, m in enumerate(steps, start=1))
    assert len(steps) == 36
    assert said.index(steps[0]) == 6
    assert (job.trained_tokens, job.estimated_finish, job.error) == (12 * tokens, None, None)


def test_progress_comes_as_metrics_and_the_loss_falls(user: User) -> None:
    job = user.job(user.train(chat_lines(), n_epochs=12), "succeeded")
    told = events(user, job.id)
    assert {e.level for e in told} == {"info"}
    metrics: list[Any] = [e.data for e in told if e.type == "metrics"]
    assert {e.data for e in told if e.type == "message"} == {None}
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
    assert job.created_at <= job.estimated_finish < job.created_at + 24 * 3600, "seconds, however slow the machine is"
    assert job.trained_tokens > 0
    assert job.finished_at is None
    ended = cancel(user, busy)
    assert ended.estimated_finish is None


def test_the_first_job_of_a_server_is_told_how_long_it_takes(base_directory: Path, tmp_path: Path) -> None:
    with running(small_config(base_directory, tmp_path)) as server:
        eventually(lambda: server.hub.trainers[0].costs.known)
        assert server.engine_stats()["training"]["tokens"] == 0, "what is tried out is nobody's training"
        user = server.user()
        job = user.train(chat_lines(), **SHORT)
        user.job(job, "queued", "running", "succeeded")
        estimate = user.http.get(f"/v1/fine_tuning/jobs/{job}").json()["estimate"]
        assert estimate["seconds"] > 0
        assert any("s with the device to itself" in m for m in messages(user, job))
        user.job(job, "succeeded")


def test_the_same_seed_and_data_make_the_same_model(user: User) -> None:
    jobs = [user.job(user.train(chat_lines(), n_epochs=1, batch_size=1), "succeeded") for _ in range(2)]
    digests = {a["versions"][0]["digest"] for a in user.http.get("/v1/adapters").json()["data"]}
    assert len(digests) == 1
    assert jobs[0].fine_tuned_model != jobs[1].fine_tuned_model


def test_retraining_a_name_makes_its_second_version(user: User) -> None:
    first = user.job(user.train(chat_lines(), suffix="mine"), "succeeded")
    second = user.job(user.train(chat_lines(answer="Well"), suffix="mine"), "succeeded")
    [adapter] = user.http.get("/v1/adapters").json()["data"]
    releases = [v for v in adapter["versions"] if v["kind"] == "release"]
    assert [(v["number"], v["model"], v["origin"]) for v in releases] == [
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
        names = [m.id for m in user.openai.models.list() if ":ckpt-step-" not in m.id]
        assert names == [BASE, f"{user.owner}/same", model]
        with pytest.raises(openai.NotFoundError):
            user.ask(others)


# -- beside requests


def test_requests_are_answered_while_a_job_runs_and_as_without_it(user: User, busy: str) -> None:
    def tokens() -> int:
        return user.openai.fine_tuning.jobs.retrieve(busy).trained_tokens or 0

    eventually(tokens)
    during = user.ask(BASE, max_tokens=40)
    stream = user.openai.chat.completions.create(
        model=BASE, messages=[{"role": "user", "content": "Hello there"}], max_tokens=40, temperature=0, stream=True
    )
    assert "".join(c.choices[0].delta.content or "" for c in stream) == during
    assert user.openai.fine_tuning.jobs.retrieve(busy).status == "running"
    seen = tokens()
    eventually(lambda: tokens() > seen)
    cancel(user, busy)
    assert user.ask(BASE, max_tokens=40) == during


# -- cancelling


def test_a_running_job_can_be_cancelled_and_tells_nothing_more(server: Server, user: User, busy: str) -> None:
    eventually(lambda: trained(user, busy) > 5)
    assert cancel(user, busy).status == "cancelled"
    said = messages(user, busy)
    assert said[-1] == "The job was cancelled"
    eventually(lambda: not any(t.running for t in server.hub.trainers))
    user.job(user.train(chat_lines(), **SHORT), "succeeded")
    job = user.openai.fine_tuning.jobs.retrieve(busy)
    assert (job.status, job.fine_tuned_model, job.result_files) == ("cancelled", None, [])
    assert [m.id for m in user.openai.models.list() if ":busy:" in m.id and ":ckpt-step-" not in m.id] == []
    assert messages(user, busy) == said
    eventually(lambda: not (server.hub.config.jobs_dir / busy).exists())


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
    eventually(lambda: not any(t.running for t in server.hub.trainers))
    names = [m.id for m in user.openai.models.list() if m.id.startswith("ft:") and ":last:" not in m.id]
    published = {name for name in names if ":ckpt-step-" not in name}
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


def test_a_file_deleted_while_its_job_runs_does_no_harm(user: User) -> None:
    job = user.train(chat_lines(), batch_size=1, n_epochs=12)
    user.job(job, "running", "succeeded")
    user.openai.files.delete(user.openai.fine_tuning.jobs.retrieve(job).training_file)
    user.job(job, "succeeded")


def test_a_training_that_diverges_never_publishes_what_is_not_finite(user: User) -> None:
    job = user.job(user.train(chat_lines(), suffix="wild", learning_rate_multiplier=100, batch_size=1, n_epochs=10))
    if job.status == "succeeded":
        assert user.ask(job.fine_tuned_model)
    else:
        assert job.error.code == "training_diverged"


def test_a_training_that_diverges_says_what_to_lower_and_others_run_on(base_directory: Path, tmp_path: Path) -> None:
    """Half precision overflows soon."""
    with running(small_config(base_directory, tmp_path, dtype="float16")) as server:
        user = server.user()
        tame = user.train(chat_lines(), suffix="tame", n_epochs=12, learning_rate_multiplier=0.1)
        wild = {"learning_rate_multiplier": 100, "batch_size": 1, "n_epochs": 12}
        job = user.job(user.train(chat_lines(), suffix="wild", **wild), "failed")
        assert job.error.code == "training_diverged"
        assert "Lower learning_rate_multiplier (it was 100)" in job.error.message
        assert messages(user, job.id)[-1] == job.error.message
        user.job(tame, "succeeded")
        assert [m.id for m in user.openai.models.list() if ":wild:" in m.id and ":ckpt-step-" not in m.id] == []


@pytest.mark.parametrize("held_out", [0, 0.25])
def test_a_training_that_diverges_keeps_its_last_good_checkpoint_and_names_it(
    user: User, held_out: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Plan, "learning_rate_at", lambda _, step, steps: 1e35 if step == 4 else 2e-3)
    how = {"batch_size": 12, "n_epochs": 8, "early_stopping": 0, "held_out": held_out, "keep_checkpoints": 1}
    job = user.job(user.train(chat_lines(12), suffix="wild", **how), "failed")
    assert job.error.code == "training_diverged"
    [kept] = user.openai.fine_tuning.jobs.checkpoints.list(job.id).data
    assert kept.step_number == 4, "the one of step 5 is what it broke with"
    assert job.error.message.endswith(
        f" The last checkpoint, {kept.fine_tuned_model_checkpoint}, can be used and trained further."
    )
    assert messages(user, job.id)[-1] == job.error.message
    assert user.ask(kept.fine_tuned_model_checkpoint)
    assert [m.id for m in user.openai.models.list() if ":wild:" in m.id] == [kept.fine_tuned_model_checkpoint]


def test_long_examples_are_cut_with_a_warning(user: User) -> None:
    content = chat_lines() + chat_lines(1, answer="word " * 600) + chat_lines(1).replace(b"Say", b"word " * 600)
    job = user.job(user.train(content, max_steps=1), "succeeded")
    warnings = [e.message for e in events(user, job.id) if e.level == "warn" and "Training file" in e.message]
    assert warnings == [
        "Training file: examples longer than 512 tokens were cut: 2 (lines 13, 14)",
        "Training file: examples with nothing left to learn were dropped: 1 (line 14)",
    ]


# -- pausing


def test_a_paused_job_goes_on_where_it_was_and_ends_as_one_that_was_never_paused(server: Server, user: User) -> None:
    config = {"batch_size": 1, "n_epochs": 4, "early_stopping": 0, "held_out": 0}
    undisturbed = user.job(user.train(chat_lines(60), suffix="one", **config), "succeeded")
    job = user.train(chat_lines(60), suffix="other", **config)
    for count in (20, 60):
        eventually(partial(lambda least: trained(user, job) > least, count))
        assert change(user, job, "pause")["status"] == "paused"
        eventually(lambda: not server.hub.worker.busy([job]))  # what it told is written down
        done = user.openai.fine_tuning.jobs.retrieve(job).trained_tokens
        user.job(user.train(chat_lines(), **SHORT), "succeeded")
        assert user.openai.fine_tuning.jobs.retrieve(job).trained_tokens == done
        assert change(user, job, "resume")["status"] == "queued"
        user.job(job, "running", "succeeded")
    ended = user.job(job, "succeeded")
    assert losses(user, job) == pytest.approx(losses(user, undisturbed.id), abs=1e-3, rel=1e-3)
    assert ended.trained_tokens == undisturbed.trained_tokens
    said = messages(user, job, steps=False)
    assert said.count("The job was paused") == said.count("The job was resumed") == 2
    resumed = [m for m in said if m.startswith("Fine-tuning job goes on after step ")]
    assert len(resumed) == 2
    steps = [e.data["step"] for e in events(user, job) if e.type == "metrics"]
    assert steps == sorted(set(steps)), "nothing was done twice"


def test_a_job_that_is_paused_and_resumed_at_once_loses_nothing(user: User) -> None:
    job = user.train(chat_lines(60), batch_size=1, n_epochs=4, early_stopping=0)
    for _ in range(10):
        for what in ("pause", "resume"):
            user.http.post(f"/v1/fine_tuning/jobs/{job}/{what}")
    user.job(job, "succeeded")
    assert len(losses(user, job)) == 240


def test_a_job_can_be_paused_while_its_file_is_read(server: Server, user: User) -> None:
    job = user.train(chat_lines(20_000), max_steps=2)
    assert change(user, job, "pause")["status"] == "paused"
    user.job(user.train(chat_lines(), **SHORT), "succeeded")
    assert messages(user, job)[-1] == "The job was paused"
    assert change(user, job, "resume")["status"] == "validating_files"
    user.job(job, "succeeded")
    assert messages(user, job).count("Files validated, moving job to queued state") == 1


def test_only_what_is_not_over_can_be_paused_and_only_what_is_paused_resumed(user: User, busy: str) -> None:
    for what, after in (("resume", "running"), ("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled")):
        answer = user.http.post(f"/v1/fine_tuning/jobs/{busy}/{what}")
        if (what, after) == ("resume", "running"):
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_status")
        else:
            assert answer.json()["status"] == after
    for what in ("pause", "resume", "cancel"):
        answer = user.http.post(f"/v1/fine_tuning/jobs/{busy}/{what}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_status")


# -- while what was learned is published


class Gate:
    """Holds up what one owner publishes as `kind`."""

    def __init__(self, server: Server, owner: str, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        publish = server.hub.registry.publish

        def held_up(whose: str, *args: Any, **options: Any) -> Any:
            if whose == owner and options["kind"] is kind:
                self.reached.set()
                assert self.open.wait(60)
            return publish(whose, *args, **options)

        monkeypatch.setattr(server.hub.registry, "publish", held_up)


def test_a_job_cancelled_while_it_is_published_changes_no_name(
    server: Server, user: User, adapter: PeftFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = user.import_adapter(adapter, "mine")
    files = user.openai.files.list().data
    gate = Gate(server, user.owner, Kind.CANDIDATE, monkeypatch)
    job = user.train(chat_lines(), suffix="mine", keep_checkpoints=0, **SHORT)
    assert gate.reached.wait(60)
    assert cancel(user, job).status == "cancelled"
    gate.open.set()
    eventually(lambda: not (server.hub.config.jobs_dir / job).exists())
    [adapter_now] = user.http.get("/v1/adapters").json()["data"]
    assert [v["id"] for v in adapter_now["versions"]] == [before["current"]]
    assert messages(user, job)[-1] == "The job was cancelled"
    assert len(user.openai.files.list().data) == len(files) + 1, "what was uploaded, and no result"


def test_a_job_paused_while_it_is_published_is_live_once_it_is_resumed(
    server: Server, user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(server, user.owner, Kind.CANDIDATE, monkeypatch)
    job = user.train(chat_lines(), suffix="mine", keep_checkpoints=0, n_epochs=12)
    assert gate.reached.wait(60)
    change(user, job, "pause")
    gate.open.set()
    eventually(lambda: [m for m in user.openai.models.list() if ":mine:" in m.id])
    assert user.openai.fine_tuning.jobs.retrieve(job).status == "paused"
    with pytest.raises(openai.NotFoundError):
        user.ask(f"{user.owner}/mine")
    change(user, job, "resume")
    done = user.job(job, "succeeded")
    assert user.ask(f"{user.owner}/mine", "Say 3") == user.ask(done.fine_tuned_model, "Say 3") == "Aye"
    [adapter] = user.http.get("/v1/adapters").json()["data"]
    assert len(adapter["versions"]) == 1
    assert len(losses(user, job)) == 36


def test_a_slow_store_holds_up_the_job_that_publishes_alone(
    server: Server, user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(server, user.owner, Kind.CHECKPOINT, monkeypatch)
    job = user.train(chat_lines(), suffix="slow", n_epochs=4)
    assert gate.reached.wait(60)
    other = server.user()
    other.job(other.train(chat_lines(), n_epochs=4), "succeeded")
    assert user.openai.fine_tuning.jobs.retrieve(job).status == "running"
    gate.open.set()
    user.job(job, "succeeded")


# -- checkpoints


def test_checkpoints_are_models_with_metrics_of_which_the_last_ones_are_kept(user: User) -> None:
    job = user.train(chat_lines(120), suffix="mine", n_epochs=5, batch_size=20, keep_checkpoints=2, early_stopping=0)
    user.job(job, "succeeded")
    said = [m for m in messages(user, job) if m.startswith("Checkpoint created at step ")]
    assert [m.split()[4] for m in said] == ["6", "12", "18", "24"]
    jobs = user.openai.fine_tuning.jobs
    kept = list(jobs.checkpoints.list(job))
    assert [c.step_number for c in kept] == [24, 18]
    for checkpoint in kept:
        assert checkpoint.fine_tuned_model_checkpoint.endswith(f":ckpt-step-{checkpoint.step_number}")
        assert checkpoint.fine_tuning_job_id == job
        assert checkpoint.metrics.step == checkpoint.step_number
        assert checkpoint.metrics.full_valid_loss is not None
        assert user.ask(checkpoint.fine_tuned_model_checkpoint)
        assert any(checkpoint.fine_tuned_model_checkpoint in m for m in said)
    gone = said[0].split()[-1]
    with pytest.raises(openai.NotFoundError):
        user.ask(gone)
    page = jobs.checkpoints.list(job, limit=1)
    assert (page.data, page.has_more) == (kept[:1], True)
    assert jobs.checkpoints.list(job, after=kept[0].id).data == kept[1:]
    user.openai.models.delete(kept[0].fine_tuned_model_checkpoint)
    assert list(jobs.checkpoints.list(job)) == kept[1:]


def test_a_checkpoint_can_be_used_while_its_job_goes_on_and_stays_when_it_is_cancelled(user: User) -> None:
    job = user.train(chat_lines(20), suffix="mine", **FOREVER)
    [checkpoint] = eventually(lambda: user.openai.fine_tuning.jobs.checkpoints.list(job).data[:1])
    assert user.openai.fine_tuning.jobs.retrieve(job).status == "running"
    said = user.ask(checkpoint.fine_tuned_model_checkpoint)
    cancel(user, job)
    assert user.ask(checkpoint.fine_tuned_model_checkpoint) == said
    with pytest.raises(openai.NotFoundError, match="no release yet"):
        user.ask(f"{user.owner}/mine")


# -- results


def test_the_result_file_has_every_step_and_belongs_to_the_owner_alone(server: Server, user: User) -> None:
    job = user.job(user.train(chat_lines(120), n_epochs=2, batch_size=12), "succeeded")
    [identity] = job.result_files
    file = user.openai.files.retrieve(identity)
    assert (file.purpose, file.filename) == ("fine-tune-results", "step_metrics.csv")
    assert file.id in [f.id for f in user.openai.files.list(purpose="fine-tune-results")]
    lines = user.openai.files.content(identity).read().decode().splitlines()
    assert lines[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    metrics = [e.data for e in events(user, job.id) if e.type == "metrics"]
    expected = [[m["step"], m["train_loss"], m["train_mean_token_accuracy"]] for m in metrics]
    assert [[float(v) for v in line.split(",")[:3]] for line in lines[1:]] == expected
    measured = [line.split(",")[0] for line in lines[1:] if line.split(",")[3]]
    assert "10" in measured, "the end of the first epoch"
    with pytest.raises(openai.NotFoundError):
        server.user().openai.files.content(identity)
    with pytest.raises(openai.BadRequestError, match="'fine-tune'"):
        user.openai.fine_tuning.jobs.create(model=BASE, training_file=identity)
    user.openai.files.delete(identity)
    assert user.openai.fine_tuning.jobs.retrieve(job.id).result_files == [identity]


def test_results_cannot_be_uploaded(user: User) -> None:
    with pytest.raises(openai.BadRequestError, match="fine-tune-results"):
        user.upload(b"step\n1\n", purpose="fine-tune-results")


# -- proof


def test_what_is_no_better_than_the_base_is_a_candidate_until_somebody_promotes_it(
    user: User, adapter: PeftFiles
) -> None:
    """A random adapter, hardly trained."""
    user.import_adapter(adapter, "mine")
    before = user.ask(f"{user.owner}/mine", "Say 3")
    job = user.train(
        chat_lines(), model=f"{user.owner}/mine", suffix="mine", max_steps=1, learning_rate_multiplier=0.001
    )
    done = user.job(job, "succeeded")
    proof = user.http.get(f"/v1/fine_tuning/jobs/{job}").json()["proof"]
    assert not proof["passed"]
    assert proof["trained"]["loss"] > proof["base"]["loss"]
    [warning] = [e.message for e in events(user, job) if e.level == "warn"]
    assert "candidate only" in warning
    assert f"a loss of {proof['trained']['loss']:.3f} on examples it was trained on" in warning
    assert f"the base's is {proof['base']['loss']:.3f}" in warning
    [found] = user.http.get("/v1/adapters").json()["data"]
    assert [(v["kind"], v["id"] == found["current"]) for v in found["versions"]] == [
        ("candidate", False),
        ("release", True),
    ]
    assert user.ask(f"{user.owner}/mine", "Say 3") == before
    user.http.post(f"/v1/adapters/{found['id']}/versions/2/promote").raise_for_status()
    assert user.http.get("/v1/adapters").json()["data"][0]["current"] == done.fine_tuned_model.split(":")[-1]


# -- going on from an adapter


def test_a_job_goes_on_from_what_an_adapter_has_learned_and_adds_a_version_to_it(user: User) -> None:
    first = user.job(user.train(chat_lines(), suffix="mine", n_epochs=12), "succeeded")
    more = user.train(chat_lines(10), suffix="mine", model=f"{user.owner}/mine", **SHORT)
    second = user.job(more, "succeeded")
    assert losses(user, more)[0] < losses(user, first.id)[0] / 2
    assert user.ask(f"{user.owner}/mine", "Say 3") == "Aye"
    [adapter] = user.http.get("/v1/adapters").json()["data"]
    assert adapter["current"] == second.fine_tuned_model.split(":")[-1]
    assert second.model == f"{user.owner}/mine"


def test_a_job_goes_on_from_a_checkpoint_or_an_imported_adapter(user: User, adapter: PeftFiles) -> None:
    job = user.train(chat_lines(), suffix="mine", n_epochs=12)
    user.job(job, "succeeded")
    [checkpoint, *_] = user.openai.fine_tuning.jobs.checkpoints.list(job).data
    name = checkpoint.fine_tuned_model_checkpoint
    user.job(user.train(chat_lines(), model=name, **SHORT), "succeeded")
    user.import_adapter(adapter, "theirs")
    done = user.job(user.train(chat_lines(), model=f"{user.owner}/theirs", **SHORT), "succeeded")
    assert done.hyperparameters.rank == 4
    with pytest.raises(openai.BadRequestError, match="has settled it"):
        user.train(chat_lines(), model=f"{user.owner}/theirs", rank=8)


def test_an_adapter_may_be_deleted_once_the_job_that_goes_on_from_it_is_validated(
    user: User, adapter: PeftFiles
) -> None:
    user.import_adapter(adapter, "mine")
    job = user.train(chat_lines(100), model=f"{user.owner}/mine", batch_size=1, n_epochs=4, early_stopping=0)
    user.job(job, "queued", "running")
    user.openai.models.delete(f"{user.owner}/mine")
    user.job(job, "succeeded")


def test_another_owners_models_files_and_jobs_are_unknown(server: Server, user: User, busy: str) -> None:
    other = server.user()
    theirs = user.openai.fine_tuning.jobs.retrieve(busy)
    for fields, param in (
        ({"model": f"{user.owner}/busy", "training_file": other.upload(chat_lines())}, "model"),
        ({"model": BASE, "training_file": theirs.training_file}, "training_file"),
        (
            {"model": BASE, "training_file": other.upload(b"x"), "validation_file": theirs.training_file},
            "validation_file",
        ),
    ):
        with pytest.raises(openai.NotFoundError) as refused:
            other.openai.fine_tuning.jobs.create(**fields)
        assert refused.value.param == param
    for method, path in (
        ("GET", ""),
        *(("GET", f"/{part}") for part in ("events", "checkpoints")),
        *(("POST", f"/{what}") for what in ("cancel", "pause", "resume")),
    ):
        found = [other.http.request(method, f"/v1/fine_tuning/jobs/{job}{path}") for job in (busy, "ftjob-none")]
        assert [f.status_code for f in found] == [404, 404]
        assert found[0].text.replace(busy, "ftjob-none") == found[1].text
    assert user.openai.fine_tuning.jobs.retrieve(busy).status == "running"


# -- many at once


def test_jobs_of_many_owners_train_at_once_up_to_the_limits(base_directory: Path, tmp_path: Path) -> None:
    config = small_config(base_directory, tmp_path, train_jobs=3, owner_jobs=2, owner_queue=4)
    with running(config) as server:
        first, second, third = server.user(), server.user(), server.user()
        mine = [first.train(chat_lines(200), **FOREVER) for _ in range(4)]
        for job in mine[:2]:
            first.job(job, "running")
        for job in mine[2:]:
            first.job(job, "queued")
        told = "You have 4 of at most 4 fine-tuning jobs under way"
        with pytest.raises(openai.RateLimitError, match=told) as refused:
            first.openai.with_options(max_retries=2).fine_tuning.jobs.create(
                model=BASE, training_file=first.upload(chat_lines())
            )
        assert refused.value.code == "exceeded_quota"
        assert refused.value.response.headers["x-should-retry"] == "false"
        theirs = second.train(chat_lines(200), **FOREVER)
        second.job(theirs, "running")
        waits = third.train(chat_lines(), **SHORT)
        third.job(waits, "queued")
        cancel(first, mine[0])
        third.job(waits, "succeeded")  # before the other jobs of the first owner, who has one already
        first.job(mine[2], "running")
        assert first.openai.fine_tuning.jobs.retrieve(mine[3]).status == "queued"
        for owner, jobs in ((first, mine[1:]), (second, [theirs])):
            for job in jobs:
                cancel(owner, job)


def test_two_jobs_of_one_name_make_a_version_each(user: User) -> None:
    jobs = [user.train(chat_lines(answer=answer), suffix="mine", n_epochs=12) for answer in ("Aye", "Well")]
    models = [user.job(job, "succeeded").fine_tuned_model for job in jobs]
    assert [user.ask(model, "Say 3") for model in models] == ["Aye", "Well"]
    [adapter] = user.http.get("/v1/adapters").json()["data"]
    releases = {v["model"] for v in adapter["versions"] if v["kind"] == "release"}
    assert releases == set(models)
    assert user.ask(f"{user.owner}/mine", "Say 3") in ("Aye", "Well")


def test_the_priority_of_a_job_is_shown_and_must_be_one_that_there_is(user: User) -> None:
    body = {"model": BASE, "training_file": user.upload(chat_lines()), "hyperparameters": SHORT}
    made = user.http.post("/v1/fine_tuning/jobs", json={**body, "priority": "high"}).json()
    assert made["priority"] == "high"
    user.job(made["id"], "succeeded")
    refused = user.http.post("/v1/fine_tuning/jobs", json={**body, "priority": "highest"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "priority")


def test_a_large_file_keeps_nobodys_small_one_waiting(
    server: Server, user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, others_are_done = threading.Event(), threading.Event()

    def slow(directory: Path, training: Path, *args: Any) -> Any:
        if training.stat().st_size > 5 * MIB:
            reading.set()
            assert others_are_done.wait(60)
        return prepare(directory, training, *args)

    monkeypatch.setattr("adapterhub.train.validator.prepare", slow)
    large = user.train(chat_lines(60_000), max_steps=1)
    assert reading.wait(60)
    other = server.user()
    other.job(other.train(chat_lines(), **SHORT), "succeeded")
    assert user.openai.fine_tuning.jobs.retrieve(large).status == "validating_files"
    cancel(user, large)
    others_are_done.set()


# -- files and adapters that go


def test_a_file_deleted_while_its_job_waits_does_no_harm(base_directory: Path, tmp_path: Path) -> None:
    with running(small_config(base_directory, tmp_path, train_jobs=1)) as server:
        user = server.user()
        busy = user.train(chat_lines(200), **FOREVER)
        user.job(busy, "running")
        waiting = user.train(chat_lines(), **SHORT)
        user.job(waiting, "queued")
        user.openai.files.delete(user.openai.fine_tuning.jobs.retrieve(waiting).training_file)
        cancel(user, busy)
        user.job(waiting, "succeeded")


def test_a_file_or_an_adapter_deleted_before_it_was_read_fails_the_job(
    server: Server, user: User, adapter: PeftFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, go_on = threading.Barrier(3), threading.Event()

    def slow(*args: Any) -> Any:
        if not go_on.is_set():
            both.wait(60)
            assert go_on.wait(60)
        return prepare(*args)

    monkeypatch.setattr("adapterhub.train.validator.prepare", slow)
    other = server.user()
    before = [other.train(chat_lines(), **SHORT) for _ in range(2)]
    both.wait(60)  # all who validate have something to do
    user.import_adapter(adapter, "mine")
    jobs = [user.train(chat_lines(), model=model) for model in (BASE, f"{user.owner}/mine")]
    user.openai.files.delete(user.openai.fine_tuning.jobs.retrieve(jobs[0]).training_file)
    user.openai.models.delete(f"{user.owner}/mine")
    go_on.set()
    first, second = (user.job(job, "failed") for job in jobs)
    assert (first.error.code, first.error.param) == ("invalid_training_file", "training_file")
    assert f"{first.training_file} was deleted" in first.error.message
    assert (second.error.code, second.error.param) == ("model_not_found", "model")
    for job in before:
        other.job(job, "succeeded")


# -- full disks


@contextmanager
def full_database(server: Server) -> Iterator[None]:
    """SQLite is told that the file may not grow: what it then says is what it says of a full disk."""

    def allow(pages: int) -> None:
        with server.hub.database.transaction() as db:
            db.execute(f"pragma max_page_count = {pages}")

    allow(1)  # no less than what it has
    try:
        yield
    finally:
        allow(1_000_000)


def test_a_full_disk_holds_up_what_is_written_down_and_nothing_is_lost(base_directory: Path, tmp_path: Path) -> None:
    with running(small_config(base_directory, tmp_path)) as server:
        user = server.user()
        file = user.upload(chat_lines())
        job = user.train(chat_lines(30), n_epochs=20, batch_size=1, early_stopping=0, held_out=0)
        eventually(lambda: trained(user, job) > 5)
        large = {"model": BASE, "training_file": file, "metadata": {str(i): "x" * 512 for i in range(16)}}
        with full_database(server):
            answer = eventually(lambda: (a := user.http.post("/v1/fine_tuning/jobs", json=large)).is_error and a)
            assert answer.status_code == 507
            assert answer.json()["error"]["code"] == "storage_full"
            assert user.ask(BASE), "requests need no disk"
            eventually(lambda: not any(t.running for t in server.hub.trainers))
            assert user.openai.fine_tuning.jobs.retrieve(job).status == "running"
        user.job(job, "succeeded")
        assert len(losses(user, job)) == 600
        user.job(user.train(chat_lines(), suffix="after", **SHORT), "succeeded")
        assert user.ask(f"{user.owner}/after")


def test_without_room_for_checkpoints_and_states_a_job_goes_on_and_says_so(
    server: Server, user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = server.hub.registry.publish

    def full(*args: Any, **options: Any) -> Any:
        if args[0] == user.owner and options["kind"] is Kind.CHECKPOINT:
            raise StorageFull("There is no room on the server's disk.")
        return publish(*args, **options)

    def no_state(path: Path, *chunks: Any) -> None:
        raise StorageFull("There is no room on the server's disk.")

    monkeypatch.setattr(server.hub.registry, "publish", full)
    monkeypatch.setattr("adapterhub.train.state.write_durably", no_state)
    job = user.train(chat_lines(), n_epochs=2)
    user.job(job, "succeeded")
    warnings = [e.message for e in events(user, job) if e.level == "warn"]
    assert warnings == [
        "The checkpoint of step 3 could not be kept: There is no room on the server's disk.",
        "The state after step 3 could not be saved: There is no room on the server's disk.",
    ]


def test_without_room_for_its_result_file_a_job_succeeds_and_says_so(
    server: Server, user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = server.hub.files.write

    def full(owner: str, filename: str, *args: Any) -> Any:
        if owner == user.owner and filename == FILENAME:
            raise StorageFull("There is no room on the server's disk.")
        return write(owner, filename, *args)

    monkeypatch.setattr(server.hub.files, "write", full)
    job = user.job(user.train(chat_lines(), suffix="mine", n_epochs=12), "succeeded")
    assert job.result_files == []
    warnings = [e.message for e in events(user, job.id) if e.level == "warn"]
    assert warnings == ["The result file could not be written: There is no room on the server's disk."]
    assert user.ask(f"{user.owner}/mine", "Say 3") == user.ask(job.fine_tuned_model, "Say 3") == "Aye"


def test_without_room_for_what_was_trained_a_job_fails_clearly(base_directory: Path, tmp_path: Path) -> None:
    with running(small_config(base_directory, tmp_path, disk_bytes=1)) as server:
        user = server.user()
        job = user.job(user.train(chat_lines(), suffix="mine", **SHORT), "failed")
        assert job.error.code == "storage_full"
        assert messages(user, job.id)[-1] == job.error.message
        assert [m.id for m in user.openai.models.list()] == [BASE]
        assert job.result_files == []
        assert [f.purpose for f in user.openai.files.list()] == ["fine-tune"]
