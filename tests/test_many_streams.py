"""A short run of `scripts/soak streams`, and that it notices what is wrong."""

from __future__ import annotations

import re

import pytest
import soak_streams

from tests.serving import PeftFiles, Server
from tests.test_soak import soak


def test_of_500_streams_a_third_is_cut_off_and_the_others_are_whole_and_right() -> None:
    run = soak("streams", "--streams", "500", "--rounds", "1")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "No fault was found" in run.stdout
    for what in ("whole", "cut amid an answer", "cut before an answer"):
        found = re.search(rf"(\d+) {what}", run.stdout)
        assert found, what
        assert int(found[1]) > 0, what


@pytest.mark.parametrize(
    ("said", "events"),
    [
        ("ended with", []),
        ("ended with", ['{"choices": []}']),
        (
            "and not",
            ['{"choices": [{"text": "no", "finish_reason": "length"}], "usage": {"completion_tokens": 5}}', "[DONE]"],
        ),
    ],
    ids=["nothing", "half", "another answer"],
)
def test_a_stream_that_is_not_whole_does_not_go_unnoticed(
    server: Server, adapter: PeftFiles, said: str, events: list[str]
) -> None:
    streams = soak_streams.Streams(server, [adapter], seed=0)
    streams._check(streams._questions[0], events)
    assert said in streams.faults[0]


def test_what_is_left_behind_does_not_go_unnoticed(
    server: Server, adapter: PeftFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak_streams, "SECONDS", 0.1)
    streams = soak_streams.Streams(server, [adapter], seed=0)
    monkeypatch.setattr(streams, "_all_at_once", nobody)
    with server.gate.passed():
        streams.round(0)
    assert "'requests': 1" in streams.faults[0]


async def nobody(_: int) -> None:
    """Asks nothing."""
