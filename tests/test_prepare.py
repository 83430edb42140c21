"""Training files become whole data sets or none, in little memory, and nothing is dropped without being told."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from adapterhub.base.embedded import EMBEDDED, base_path
from adapterhub.base.text import TextCodec
from adapterhub.errors import BadRequest, InvalidTrainingFile
from adapterhub.train.dataset import Kind
from adapterhub.train.prepare import Prepared
from adapterhub.train.report import Found, Report
from tests.datasets import ASK, SAY, Files, chat, contents, lines, numbered, preference


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec(AutoTokenizer.from_pretrained(base_path(EMBEDDED)))


@pytest.fixture
def files(tmp_path: Path, codec: TextCodec) -> Files:
    return Files(tmp_path, codec)


# -- duplicates


def test_duplicates_are_dropped_and_told_with_their_lines(files: Files) -> None:
    records = numbered(12)
    report = files.prepare(lines(*records, records[3], b"", records[3], records[0])).report
    assert report.training.items == 12
    assert report.training.duplicates == Found(3, (13, 15, 16))
    assert ("warn", "Training file: duplicates of earlier ones were dropped: 3 (lines 13, 15, 16)") in report.messages()


def test_the_same_tokens_with_another_mask_are_no_duplicate(files: Files) -> None:
    both = [chat(ASK, SAY, ASK, SAY), chat(ASK, {**SAY, "weight": 0}, ASK, SAY)]
    prepared = files.prepare(lines(*both * 5))
    [[one], [two]] = contents(prepared.train)
    assert one.tokens == two.tokens
    assert one.learned != two.learned


def test_items_keep_the_order_of_the_file(files: Files) -> None:
    records = numbered(300)
    alone = [contents(files.prepare(lines(*[r] * 10)).train)[0] for r in records[::50]]
    assert contents(files.prepare(lines(*records)).train)[::50] == alone


# -- what measures


def test_a_validation_file_loses_what_the_training_file_has_too(files: Files) -> None:
    prepared = files.prepare(lines(*numbered(20)), lines(*numbered(10, start=15), *numbered(1, start=24)))
    assert prepared.valid is not None
    assert contents(prepared.valid) == contents(files.prepare(lines(*numbered(5, start=20) * 2)).train)
    report = prepared.report
    assert report.validation is not None
    assert report.validation.duplicates == Found(6, (1, 2, 3, 4, 5, 11))
    assert (report.training.items, report.validation.items, report.held_out) == (20, 5, False)


def test_the_training_file_as_the_validation_file_measures_nothing_and_says_so(files: Files) -> None:
    content = lines(*numbered(12))
    prepared = files.prepare(content, content)
    assert prepared.valid is None
    assert len(prepared.train) == 12
    assert prepared.report.messages()[-1] == (
        "warn",
        "No example of the validation file is left; the loss on it cannot be measured",
    )


@pytest.mark.parametrize(("count", "taken"), [(10, 0), (99, 0), (100, 5), (400, 20), (3000, 64)])
def test_without_a_validation_file_a_part_of_a_large_enough_file_is_held_out(
    files: Files, count: int, taken: int
) -> None:
    prepared = files.prepare(lines(*numbered(count), *numbered(10)), held_out=None)
    held = contents(prepared.valid)
    assert (len(prepared.train), len(held)) == (count - taken, taken)
    everything = contents(files.prepare(lines(*numbered(count))).train)
    assert sorted(contents(prepared.train) + held, key=str) == sorted(everything, key=str)
    assert prepared.report.held_out is (taken > 0)
    assert (prepared.report.validation is not None) is (taken > 0)


def test_how_much_is_held_out_can_be_said(files: Files) -> None:
    content = lines(*numbered(20))
    for share, taken in ((0.0, 0), (0.01, 0), (0.1, 2), (0.5, 10)):
        prepared = files.prepare(content, held_out=share)
        assert (len(prepared.train), len(contents(prepared.valid))) == (20 - taken, taken)
    with pytest.raises(BadRequest, match="give one of the two"):
        files.prepare(content, content, held_out=0.1)


def test_the_one_example_that_is_left_is_trained_on(files: Files) -> None:
    prepared = files.prepare(lines(*numbered(1) * 10), held_out=0.5)
    assert (len(prepared.train), prepared.valid) == (1, None)


def test_the_seed_chooses_what_is_held_out(files: Files) -> None:
    content = lines(*numbered(200))
    one, same, other = (contents(files.prepare(content, held_out=None, seed=seed).valid) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_turns_of_one_conversation_are_held_out_together(files: Files) -> None:
    changed: Any = AutoTokenizer.from_pretrained(base_path(EMBEDDED))
    changed.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] if loop.last or m['role'] == 'user' else '' }};"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    records = [
        chat(*[m for turn in range(3) for m in ({**ASK, "content": f"{i}, {turn}?"}, {**SAY, "content": f"<{i}>"})])
        for i in range(60)
    ]
    prepared = files.prepare(lines(*records), held_out=0.1, codec=TextCodec(changed))
    assert prepared.valid is not None

    def conversations(data: Any) -> list[str]:
        return [files.codec.decode(item[0].tokens.tolist()).rpartition("<")[2] for item in data]

    held, trained = conversations(prepared.valid), conversations(prepared.train)
    assert len(held) == 18
    assert len(set(held)) == 6
    assert not set(held) & set(trained)


# -- preferences


def test_preferences_are_prepared_as_pairs(files: Files) -> None:
    records = [preference(ASK, better=f"Aye {i}.", worse="No.") for i in range(120)]
    prepared = files.prepare(lines(*records, records[0]), kind=Kind.DPO, held_out=None)
    assert prepared.train.kind is Kind.DPO
    assert prepared.valid is not None
    assert (len(prepared.train), len(prepared.valid)) == (114, 6)
    assert prepared.report.training.duplicates == Found(1, (121,))
    assert prepared.train.lengths[0] == sum(len(e.tokens) for e in prepared.train[0])


# -- errors


def test_errors_of_the_validation_file_name_it(files: Files) -> None:
    good = lines(*numbered(12))
    for content, code, words in (
        (good + b"{\n", "invalid_validation_file", "Line 13 of the validation file cannot be used"),
        (b"\n\n", "invalid_n_examples", r"Validation file has 0 example\(s\), but must have at least 1 example$"),
        (lines(chat({**ASK, "content": "word " * 600}, SAY)), "invalid_validation_file", "anything left to learn"),
    ):
        with pytest.raises(InvalidTrainingFile, match=words) as caught:
            files.prepare(good, content)
        assert (caught.value.code, caught.value.param) == (code, "validation_file")
        assert files.left == []
        assert Prepared.open(files.job) is None


def test_too_few_examples_are_told_in_openais_words(files: Files) -> None:
    with pytest.raises(InvalidTrainingFile) as caught:
        files.prepare(lines(*numbered(9)))
    assert caught.value.body["error"] == {
        "message": "Training file has 9 example(s), but must have at least 10 examples",
        "type": "invalid_request_error",
        "param": "training_file",
        "code": "invalid_n_examples",
    }


def test_a_file_that_is_gone_is_an_error_of_its_own(files: Files) -> None:
    content = lines(*numbered(12))
    files.prepare(content, content)
    (files.directory / "validation.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="validation"):
        files.prepare_at(files.directory / "training.jsonl", files.directory / "validation.jsonl")
    assert files.left == []


# -- the report


def test_the_report_survives_the_disk(files: Files) -> None:
    long = chat({**ASK, "content": "word " * 600}, SAY)
    for held_out, validation in ((None, lines(*numbered(2), long, *numbered(3, start=90))), (0.2, None)):
        made = files.prepare(lines(*numbered(30), long, *numbered(2)), validation, held_out=held_out)
        found = Prepared.open(files.job)
        assert found is not None
        assert found.report == made.report == Report.parse(made.report.json)
        assert json.loads(made.report.json)["training"]["empty"] == {"count": 1, "lines": [31]}
        assert contents(found.train) == contents(made.train)
        assert contents(found.valid) == contents(made.valid)


def test_only_the_first_twenty_lines_are_named(files: Files) -> None:
    report = files.prepare(lines(*numbered(10) * 4)).report
    assert report.training.duplicates == Found(30, tuple(range(11, 31)))
    [(_, message)] = [m for m in report.messages() if "duplicates" in m[1]]
    assert message.endswith("28, 29, 30, ...)")


def test_what_was_cut_is_told(files: Files) -> None:
    long = chat(ASK, {**SAY, "content": "word " * 600})
    report = files.prepare(lines(*numbered(10), long)).report
    assert report.messages()[1] == ("warn", "Training file: examples longer than 512 tokens were cut: 1 (line 11)")


# -- whole or not there


def test_what_on_line_raises_ends_it_and_leaves_nothing_behind(files: Files) -> None:
    class Cancelled(Exception): ...

    content = lines(*numbered(10_000))
    calls = 0

    def cancel() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Cancelled

    files.prepare(content)
    with pytest.raises(Cancelled):
        files.prepare(content, on_line=cancel)
    assert files.left == []
    calls = 2
    with pytest.raises(Cancelled):
        files.prepare(lines(*numbered(12)), on_line=cancel)


def test_preparing_again_replaces_all_of_it(files: Files) -> None:
    files.prepare(lines(*numbered(20)), lines(*numbered(5, start=50)))
    (files.job / "train.data.0000.partial").write_bytes(b"of a kill")
    files.prepare(lines(*numbered(12)))
    found = Prepared.open(files.job)
    assert found is not None
    assert (len(found.train), found.valid, files.left) == (12, None, ["report.json", "train.data"])


def test_a_damaged_data_set_is_none(files: Files) -> None:
    for name in ("train.data", "valid.data", "report.json"):
        files.prepare(lines(*numbered(20)), held_out=0.1)
        path = files.job / name
        path.write_bytes(path.read_bytes()[:-1])
        assert Prepared.open(files.job) is None


MOMENTS = {"open", "os.rename", "os.remove", "os.mkdir"}  # of Python's audit events


def killed(moment: int, act: Callable[[Callable[[], None]], object]) -> bool:
    """Has a copy of this process `act`, which dies at the given one of the moments at which something happens on disk.

    `act` is given something to call at more of them. False when it was done before.
    """
    child = os.fork()
    if child == 0:
        left = moment

        def happens() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def fsync(descriptor: int, sync: Callable[[int], None] = os.fsync) -> None:
            sync(descriptor)
            happens()

        os.fsync = fsync
        sys.addaudithook(lambda event, _: happens() if event in MOMENTS else None)
        try:
            act(happens)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("before", [False, True])
def test_killed_at_any_moment_there_is_a_whole_data_set_or_none(files: Files, before: bool) -> None:
    content = lines(*numbered(700))
    expected = files.prepare(content, held_out=0.1)
    trained, held = contents(expected.train), contents(expected.valid)
    earlier: Any = None
    whole = 0
    for moment in itertools.count(1):
        shutil.rmtree(files.job, ignore_errors=True)
        if before:
            old = files.prepare(lines(*numbered(20)), lines(*numbered(5, start=50)))
            earlier = contents(old.train), contents(old.valid)
        again = killed(moment, lambda tick: files.prepare(content, held_out=0.1, on_line=tick))
        found = Prepared.open(files.job)
        if found is not None:
            new = len(found.train) != 20
            whole += new
            assert (contents(found.train), contents(found.valid)) == ((trained, held) if new else earlier)
        if not again:
            break
    assert moment > 20
    assert 1 < whole < moment / 2
    files.prepare(content, held_out=0.1)
    assert files.left == ["report.json", "train.data", "valid.data"]


FULL = """
import resource, sys
from pathlib import Path
from adapterhub.base.text import TextCodec
from adapterhub.errors import StorageFull
from tests.datasets import Files, lines, numbered
from transformers import AutoTokenizer

files = Files(Path(sys.argv[1]), TextCodec(AutoTokenizer.from_pretrained(sys.argv[2])))
content = lines(*numbered(1500))
files.prepare(content)
size = (files.job / "train.data").stat().st_size
for limit in (1000, size // 2, size - 1):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    path = files.directory / "training.jsonl"
    try:
        files.prepare_at(path)
    except StorageFull:
        print(files.left)
"""


def test_a_full_disk_says_so_and_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL, tmp_path, base_path(EMBEDDED)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n" * 3


# -- memory

MEASURED = """
import sys
from pathlib import Path
from adapterhub.base.text import TextCodec
from tests.datasets import Files
from transformers import AutoTokenizer

def peak():
    # of this process alone: what getrusage tells begins with the peak of the parent
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024

files = Files(Path(sys.argv[1]), TextCodec(AutoTokenizer.from_pretrained(sys.argv[2])))
files.prepare_at(files.directory / "small.jsonl")
before = peak()
prepared = files.prepare_at(files.directory / "large.jsonl", held_out=None)
print(peak() - before, len(prepared.train), len(prepared.valid), prepared.report.training.duplicates.count)
"""


def test_a_file_of_tens_of_megabytes_takes_little_memory(tmp_path: Path) -> None:
    rng = random.Random(1)
    words = ("ship", "cat", "storm", "captain", "sail", "across", "wide", "ocean", "under", "moon", "lantern")
    small = lines(*({"prompt": "a", "completion": " ".join(rng.choices(words, k=300))} for _ in range(2000)))
    large = tmp_path / "large.jsonl"
    items = 0
    with large.open("wb") as file:
        while file.tell() < 24 * 2**20:
            for _ in range(100):  # many small ones, for what is kept of each
                file.write(b'{"prompt": "%d?", "completion": "%d"}\n' % (items, items))
                items += 1
            file.write(small[: 64 * 1024].rpartition(b"\n")[0] + b"\n")  # and much text
    (tmp_path / "small.jsonl").write_bytes(small)
    command = [sys.executable, "-c", MEASURED, tmp_path, base_path(EMBEDDED)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    growth, trained, held, duplicates = map(float, done.stdout.split())
    assert (items - 200 < trained + held < items + 200, held) == (True, 64)
    assert duplicates > 5000
    assert growth < 32, f"{growth:.0f} MiB for a file of 24"
