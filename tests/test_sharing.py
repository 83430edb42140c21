"""A server that trains while it is asked: what an operator sees of it, and may choose."""

from __future__ import annotations

import re
from pathlib import Path

from tests.serving import BASE, chat_lines, eventually, process, run_cli, running, small_config


def test_an_operator_sees_what_training_gets_while_requests_run(base_directory: Path, tmp_path: Path) -> None:
    with running(small_config(base_directory, tmp_path, train_latency_slo=1.5)) as server:
        user = server.user()
        alone = user.ask(BASE, max_tokens=40)
        eventually(lambda: "no job is training" in run_cli("top", "--once", user=server.admin).stdout)
        user.job(user.train(chat_lines(200), n_epochs=100, batch_size=1), "running")
        before = eventually(lambda: server.engine_stats()["training"]["tokens"])
        told = eventually(
            lambda: (
                user.ask(BASE, max_tokens=40) == alone
                and (seen := server.engine_stats()["training"])["tokens"] > before
                and seen
            )
        )
        assert told["runs"] == 1
        assert told["latency_slo"] == 1.5
        assert 0 < told["share"] <= 1
        said = run_cli("top", "--once", user=server.admin).stdout
        assert re.search(
            r"1 job training: [\d.]+% of the time, \d+ tokens/s; "
            r"token latency p95 \d+ ms, \d+ ms without \(allowed: 1.5 times that\)",
            said,
        ), said


def test_a_bound_that_no_training_could_keep_is_refused() -> None:
    refused = run_cli("serve", "--train-latency-slo", "0.9")
    assert refused.returncode == 2
    assert "'--train-latency-slo': Input should be greater than or equal to 1" in refused.stderr


def test_an_operator_says_how_many_jobs_train_at_once(base_directory: Path, tmp_path: Path) -> None:
    with process(base_directory, tmp_path / "data", "--train-jobs", "2", "--owner-jobs", "1") as made:
        server = made.start()
        first, second, third = (server.user(name) for name in ("first", "second", "third"))
        endless = {"n_epochs": 100, "batch_size": 1}
        running_one, waiting = (first.train(chat_lines(200), **endless) for _ in range(2))
        first.job(running_one, "running")
        first.job(waiting, "queued")
        other = second.train(chat_lines(200), **endless)
        second.job(other, "running")
        last = third.train(chat_lines(), n_epochs=1)
        third.job(last, "queued")
        assert first.openai.fine_tuning.jobs.retrieve(waiting).status == "queued"
        second.openai.fine_tuning.jobs.cancel(other)
        third.job(last, "succeeded")
        assert server.stop() == 0
