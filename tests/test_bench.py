"""`scripts/bench`: what it measures of the server, in small, and the page it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks import decode, report, trace
from benchmarks.load import Answer, Asked
from benchmarks.peers import Setting
from benchmarks.process import PeerProcess, peer_process
from benchmarks.server import write_peft_directories
from figure import Figure

from adapterhub.base.embedded import EMBEDDED, base_path

ALONE = Setting(vllm=None, peft=False, plots=None)


def test_decode_measures_the_base_and_adapters_beside_the_memorys_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "STREAMS", (1, 2))
    monkeypatch.setattr(decode, "TOKENS", 4)
    monkeypatch.setattr(decode, "ROUNDS", 1)
    figures = {figure.name: figure for figure in decode.run(ALONE)}
    assert list(figures) == [
        "1 stream, base", "1 stream, one adapter", "2 streams, base", "2 streams, one adapter",
        "2 streams, all different", "1 stream, base, int4", "memory bandwidth",
    ]  # fmt: skip
    assert all(figure.median > 0 for figure in figures.values())
    assert "of the memory's limit" in figures["1 stream, base, int4"].note


def test_a_peer_that_is_a_library_loads_an_adapter_and_answers(tmp_path: Path) -> None:
    with peer_process("PEFT", "peft_peer", base_path(EMBEDDED)) as peer:
        assert peer.load(write_peft_directories(tmp_path, 1)[0]) > 0
        assert peer.ask([0, 0], 2, [1, 2, 3]).first_ms > 0


def test_a_peer_that_does_one_thing_at_a_time_lets_those_wait_who_come_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(PeerProcess, "_order", lambda self, order: [(0.5, 2.0)])
    peer = PeerProcess("peer", None, None)  # type: ignore[arg-type]
    asked = [Asked(0.0, [1], 3), Asked(1.0, [1], 3), Asked(9.0, [1], 3)]
    answers = peer.follow([0, 0, 0], asked)
    assert answers == [Answer(0.5, 2.0, 3), Answer(1.5, 3.0, 3), Answer(0.5, 2.0, 3)]


def test_a_page_keeps_the_sections_that_were_not_measured_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(report, "DOCS", tmp_path)
    titles = {"one": "What one is.", "other": "What the other is."}
    report.publish({"one": [Figure.of("a figure", "ms", [1.0, 3.0], "a note")]}, titles)
    report.publish({"other": [Figure.of("another", "s", [2.0])]}, titles)
    report.publish({"one": [Figure.of("a figure", "ms", [5.0])]}, titles)
    page = (tmp_path / "benchmarks.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("## ")] == ["## one", "## other"]
    assert "| a figure | 5 | 5 | 5 | ms | 1 |  |" in page
    assert "| another | 2 | 2 | 2 | s | 1 |  |" in page
    assert "a note" not in page
    assert json.loads((tmp_path / "benchmarks.json").read_text()).keys() == titles.keys()


def test_a_trace_is_told_by_its_first_tokens() -> None:
    figure = trace._figure("some", [Answer(0.02, 0.1, 3, "device"), Answer(7.0, 8.0, 3, "disk")], "a limit")
    assert (figure.low, figure.high) == (20, 7000)
    assert figure.note.startswith("p99 7000; under 6 s 50%; on the device 50%; ")
    assert figure.note.endswith("; a limit")
    assert "on the device" not in trace._figure("a peer", [Answer(0.02, 0.1, 3)]).note
