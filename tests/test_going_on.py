"""Jobs that go on from an adapter: from which version, after whom, and what the new version has to be better than."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serving import PeftFiles, Server, User, chat_lines

LEARN = {"n_epochs": 12, "keep_checkpoints": 0}


def look(user: User, job: str) -> dict[str, Any]:
    return user.http.get(f"/v1/fine_tuning/jobs/{job}").raise_for_status().json()


def change(user: User, job: str, what: str) -> None:
    user.http.post(f"/v1/fine_tuning/jobs/{job}/{what}").raise_for_status()


def messages(user: User, job: str) -> list[str]:
    """What its events say, the oldest first."""
    return [e.message for e in user.openai.fine_tuning.jobs.list_events(job, limit=1000)][::-1]


def paused(user: User, content: bytes, **fields: Any) -> str:
    job = user.train(content, **fields)
    change(user, job, "pause")
    return job


@pytest.fixture
def first(user: User, adapter: PeftFiles) -> str:
    """The first version of the adapter `mine`, of rank 4."""
    user.import_adapter(adapter, "mine")
    return user.openai.models.list().data[-1].id


# -- after whom


def test_an_append_waits_for_the_one_before_and_goes_on_from_what_that_has_made(
    server: Server, user: User, first: str
) -> None:
    mine = {"suffix": "mine", "model": f"{user.owner}/mine"}
    one = paused(user, chat_lines(answer="Well"), **LEARN, **mine)
    two = user.train(chat_lines(10), max_steps=1, **mine)
    assert user.job(two, "queued").status == "queued"
    assert look(user, two)["initial_model"] == first
    assert messages(user, two).count(f"The job waits for {one}, and goes on from what {user.owner}/mine is then") == 1
    user.job(user.train(chat_lines(), suffix="other", max_steps=1), "succeeded")
    assert look(user, two)["status"] == "queued", "a place is free, and still it waits"
    kept = user.http.get("/v1/quotas").json()["used"]["bytes"]
    model = server.hub.base.layout.numel(4) * server.hub.base.dtype.itemsize
    quota = {"bytes": kept + model + 16 * 1024}  # of the first, and its result file: no job may count twice
    server.admin.http.patch(f"/admin/quotas/{user.owner}", json=quota).raise_for_status()
    change(user, one, "resume")
    made = [user.job(job, "succeeded").fine_tuned_model for job in (one, two)]
    assert [look(user, job)["initial_model"] for job in (one, two)] == [first, made[0]]
    said = messages(user, two)
    assert f"{user.owner}/mine is now {made[0]}: the job goes on from that" in said
    assert f"Fine-tuning job started from {made[0]}" in said
    assert len([m for m in said if m.startswith("Training file: ")]) == 1, "the file was read once"


def test_a_version_that_is_named_is_gone_on_from_at_once(user: User, first: str) -> None:
    one = paused(user, chat_lines(), suffix="mine", model=f"{user.owner}/mine", **LEARN)
    for name in (first, f"{user.owner}/mine@1"):
        two = user.train(chat_lines(10), suffix="mine", model=name, max_steps=1)
        user.job(two, "succeeded")
        assert look(user, two)["initial_model"] == first
    change(user, one, "cancel")


@pytest.mark.parametrize("end", ["cancelled", "failed"])
def test_an_append_goes_on_without_one_before_it_that_has_made_nothing(user: User, first: str, end: str) -> None:
    mine = {"suffix": "mine", "model": f"{user.owner}/mine"}
    one = paused(user, chat_lines(5000) + b"this is no JSON\n", **mine)
    two = user.train(chat_lines(10), max_steps=1, **mine)
    user.job(two, "queued")
    change(user, one, "cancel" if end == "cancelled" else "resume")
    user.job(one, end)
    user.job(two, "succeeded")
    assert look(user, two)["initial_model"] == first


def test_an_append_goes_on_from_what_its_owner_has_promoted_meanwhile(
    user: User, first: str, other_adapter: PeftFiles
) -> None:
    mine = {"suffix": "mine", "model": f"{user.owner}/mine"}
    user.import_adapter(other_adapter, "mine")
    one = paused(user, chat_lines(), **LEARN, **mine)
    two = user.train(chat_lines(10), max_steps=1, **mine)
    assert user.job(two, "queued").hyperparameters.rank == 3
    [adapter] = user.http.get("/v1/adapters").json()["data"]
    user.http.post(f"/v1/adapters/{adapter['id']}/rollback").raise_for_status()
    change(user, one, "cancel")
    done = user.job(two, "succeeded")
    assert (look(user, two)["initial_model"], done.hyperparameters.rank) == (first, 4)


def test_what_a_waiting_append_would_go_on_from_may_be_deleted(user: User, first: str) -> None:
    mine = {"suffix": "mine", "model": f"{user.owner}/mine"}
    one = paused(user, chat_lines(), **LEARN, **mine)
    two = user.train(chat_lines(10), max_steps=1, **mine)
    user.job(two, "queued")
    user.openai.models.delete(f"{user.owner}/mine")
    change(user, one, "cancel")
    user.job(two, "succeeded")
    assert look(user, two)["initial_model"] == first


# -- what it has to be better than


def test_a_version_that_is_worse_than_what_it_went_on_from_is_a_candidate_only(user: User) -> None:
    """It answers otherwise, while the validation file asks for what the adapter has said so far."""
    before = user.job(user.train(chat_lines(), suffix="mine", **LEARN), "succeeded").fine_tuned_model
    fields = {
        "model": f"{user.owner}/mine",
        "suffix": "mine",
        "training_file": user.upload(chat_lines(answer="Well")),
        "validation_file": user.upload(chat_lines()),
        "hyperparameters": {"max_steps": 1, "keep_checkpoints": 0},
    }
    job = user.http.post("/v1/fine_tuning/jobs", json=fields).raise_for_status().json()["id"]
    user.job(job, "succeeded")
    proof = look(user, job)["proof"]
    initial, trained, base = (proof[name]["loss"] for name in ("initial", "trained", "base"))
    assert initial < trained < base
    assert (proof["passed"], proof["held_out"]) == (False, True)
    [warning] = [m for m in messages(user, job) if m.startswith("Published as a candidate only")]
    assert "as it is worse than what it went on from" in warning
    assert f"the base's is {base:.3f}, that of {before} {initial:.3f}" in warning
    [adapter] = user.http.get("/v1/adapters").json()["data"]
    assert adapter["current"] == before.split(":")[-1]
