"""The trace: what is recorded is read back, through rotation, kills, restarts, a full disk and an erasing."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.config import MIB
from adapterhub.swap import generate
from adapterhub.swap.frames import Trace, erase_owner, read_trace
from adapterhub.swap.generate import Shape
from adapterhub.swap.ref import Use
from adapterhub.swap.trace import Recorder
from tests.serving import BASE, PeftFiles, eventually, process
from tests.uses import use


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    made = Recorder(tmp_path / "trace")
    yield made
    made.close()


def recorded(directory: Path) -> list[Use]:
    return list(read_trace(directory))


# -- what goes in comes out


def test_what_is_recorded_is_read_back(recorder: Recorder) -> None:
    uses = [use(i) for i in range(5000)]
    for one in uses:
        recorder.record(one)
    recorder.flush()
    trace = read_trace(recorder.directory)
    assert list(trace) == uses
    assert len(trace.adapters) == 7
    assert recorder.stats()["recorded"] == 5000


def test_a_thread_writes_what_gathers_while_readers_read(recorder: Recorder) -> None:
    recorder.start()
    for i in range(100):
        recorder.record(use(i))
    eventually(lambda: len(read_trace(recorder.directory)) == 100)
    recorder.record(use(100))
    recorder.close()
    assert recorded(recorder.directory) == [use(i) for i in range(101)]


def test_uses_are_read_in_the_order_of_their_times(recorder: Recorder) -> None:
    for i in (3, 1, 2, 0):
        recorder.record(use(i))
        recorder.flush()
    assert recorded(recorder.directory) == [use(i) for i in range(4)]


def test_a_directory_that_does_not_exist_holds_no_uses(tmp_path: Path) -> None:
    assert recorded(tmp_path / "none") == []


def test_a_use_takes_less_than_20_bytes(recorder: Recorder) -> None:
    for i in range(50_000):
        recorder.record(use(i, adapters=100))
    recorder.flush()
    assert sum(path.stat().st_size for path in recorder.directory.iterdir()) < 20 * 50_000


def test_only_the_server_s_user_can_read_it(recorder: Recorder) -> None:
    recorder.record(use(0))
    recorder.flush()
    assert recorder.directory.stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in recorder.directory.iterdir())


# -- bounds


def test_the_oldest_go_when_the_whole_is_over_its_bound(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, max_bytes=MIB)
    for i in range(200_000):  # 3.4 MB
        recorder.record(use(i, adapters=50))
        if i % 1000 == 999:
            recorder.flush()
            assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= MIB
    recorder.close()
    left = recorded(tmp_path)
    assert left == [use(i, adapters=50) for i in range(200_000 - len(left), 200_000)]
    assert len(left) * 17 > MIB * 0.6


def test_many_starts_do_not_make_endless_small_files(tmp_path: Path) -> None:
    for i in range(600):
        recorder = Recorder(tmp_path, max_bytes=MIB)
        recorder.record(use(i))
        recorder.close()
    assert len(list(tmp_path.iterdir())) <= MIB // 4096
    assert recorded(tmp_path)[-1] == use(599)


def test_a_full_queue_drops_and_says_how_many(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, max_pending=10)
    for i in range(25):
        recorder.record(use(i))
    assert recorder.dropped == recorder.stats()["dropped"] == 15
    recorder.close()
    assert recorded(tmp_path) == [use(i) for i in range(10)]


def test_recording_does_not_wait_for_the_one_who_writes(recorder: Recorder) -> None:
    recorder.record(use(0))
    done = threading.Event()

    def record() -> None:
        recorder.record(use(1))
        done.set()

    with recorder._writing:  # a write that takes forever
        thread = threading.Thread(target=record)
        thread.start()
        assert done.wait(60)
    thread.join()


# -- kills, restarts, and disks that are full

_RECORD_FOREVER = """
import sys
from pathlib import Path
from adapterhub.swap.trace import Recorder
from tests.uses import use
recorder = Recorder(Path(sys.argv[1]))
i = int(sys.argv[2])
while True:
    recorder.record(use(i))
    i += 1
    if i % 300 == 0:
        recorder.flush()
        print(i, flush=True)
"""


def test_what_was_written_survives_kill_9_and_a_restart_goes_on(tmp_path: Path) -> None:
    begin = 0
    for run in range(3):
        command = [sys.executable, "-c", _RECORD_FOREVER, str(tmp_path), str(begin)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if int(line) > begin + 3000 * (run + 1):
                    process.send_signal(signal.SIGKILL)
                    break
            said = [int(line), *map(int, process.stdout.read().split())]
        found = recorded(tmp_path)
        assert len(found) >= max(said)
        assert found == [use(i) for i in range(len(found))]
        begin = len(found)


@given(cut=st.integers(0, 3000), flipped=st.one_of(st.none(), st.integers(0, 3000)))
def test_a_file_that_was_cut_or_damaged_gives_what_was_whole_before(
    cut: int, flipped: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("trace")
    recorder = Recorder(directory)
    ends = {0: 0}  # file size -> uses
    for i in range(120):
        recorder.record(use(i))
        if i % 10 == 9:
            recorder.flush()
            [path] = directory.iterdir()
            ends[path.stat().st_size] = i + 1
    recorder.close()
    content = bytearray(path.read_bytes()[: len(path.read_bytes()) - cut])
    whole = len(content)
    if flipped is not None and flipped < len(content):
        content[flipped] ^= 1
        whole = flipped
    path.write_bytes(content)
    expected = max(uses for size, uses in ends.items() if size <= whole)
    assert recorded(directory) == [use(i) for i in range(expected)]
    again = Recorder(directory)
    again.record(use(500))
    again.close()
    assert recorded(directory) == [*(use(i) for i in range(expected)), use(500)]


_FILL = """
import logging, resource, sys
from pathlib import Path
from adapterhub.swap import trace
from tests.uses import use
logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
trace._PAUSE_SECONDS = 0.0
recorder = trace.Recorder(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
for i in range(1000):
    recorder.record(use(i))
    recorder.flush()
    if i == 900:
        print(recorder.stats())
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(recorder.dropped)
"""


def test_a_full_disk_loses_only_what_did_not_fit_and_says_so(tmp_path: Path) -> None:
    """The limit on a file's size stands for a full disk: what is written beyond it fails."""
    done = subprocess.run([sys.executable, "-c", _FILL, str(tmp_path)], capture_output=True, text=True, check=True)
    dropped = int(done.stdout.splitlines()[-1])
    assert done.stderr.count("WARNING") == dropped > 0, done.stderr
    assert "recording pauses, serving goes on" in done.stderr
    assert len(recorded(tmp_path)) == 1000 - dropped


def test_while_the_disk_is_full_nothing_is_tried_and_the_queue_stays_bounded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "trace"
    directory.write_text("not a directory, so that every write fails")
    recorder = Recorder(directory, max_pending=100)
    for i in range(500):
        recorder.record(use(i))
        recorder.flush()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert recorder.dropped == 400
    assert recorder.stats() == {"bytes": 0, "max_bytes": 64 * MIB, "recorded": 0, "dropped": 400, "paused": True}
    recorder.close()


# -- erasing


@given(uses=st.lists(st.integers(0, 60), max_size=60), flushes=st.integers(1, 9), erased=st.integers(0, 3))
def test_erasing_an_owner_leaves_exactly_the_others(
    uses: list[int], flushes: int, erased: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory, owner = tmp_path_factory.mktemp("trace"), f"owner-{erased}"
    recorder = Recorder(directory)
    for position, i in enumerate(uses):
        recorder.record(use(i))
        if position % flushes == flushes - 1:
            recorder.flush()
    mine = sum(use(i).owner == owner for i in uses)
    assert recorder.erase(owner) == mine
    recorder.record(use(61))
    recorder.close()
    others = [use(i) for i in sorted(uses) if use(i).owner != owner]
    assert recorded(directory) == [*others, use(61)]
    assert (owner.encode() in b"".join(path.read_bytes() for path in directory.iterdir())) == (use(61).owner == owner)


def test_erasing_reaches_what_lies_behind_a_torn_frame(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.record(use(0))
    recorder.flush()
    recorder.record(use(1))
    recorder.close()
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    assert b"owner-1" in path.read_bytes()
    erase_owner(tmp_path, "owner-1")
    assert b"owner-1" not in path.read_bytes()
    assert recorded(tmp_path) == [use(0)]


def test_without_room_to_rewrite_a_file_it_is_removed(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    for i in range(30_000):
        recorder.record(use(i))
    recorder.close()
    script = f"""
import resource
from pathlib import Path
from adapterhub.swap.frames import erase_owner
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, {resource.RLIM_INFINITY}))
erase_owner(Path({str(tmp_path)!r}), "owner-1")
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, env=os.environ)
    assert list(tmp_path.iterdir()) == []


# -- generated traces


@pytest.mark.parametrize("skew", [0.0, 0.8, 1.0, 1.4])
def test_zipf_asks_for_each_as_often_as_its_law_says(skew: float) -> None:
    counts = np.bincount(generate.zipf(50, 200_000, skew), minlength=50) / 200_000
    weights = 1 / np.arange(1, 51) ** skew
    assert np.abs(counts - weights / weights.sum()).max() < 0.004


@pytest.mark.parametrize("alpha", [0.1, 0.3, 1.0])
def test_power_asks_for_each_as_often_as_its_law_says(alpha: float) -> None:
    counts = np.bincount(generate.power(50, 200_000, alpha), minlength=50) / 200_000
    shares = np.diff((np.arange(51) / 50) ** alpha)  # the distribution function of the power law is x ** alpha
    assert np.abs(counts - shares).max() < 0.004


def test_a_generated_trace_has_the_ranks_in_turn_and_the_rate_it_is_meant_to_have() -> None:
    trace: Trace = generate.generate(Shape.ZIPF, 10, 20_000, 1.0, [8, 16])
    assert [a.nbytes // generate.RANK_BYTES for a in trace.adapters] == [8, 16] * 5
    assert len({a.digest for a in trace.adapters}) == len({a.owner for a in trace.adapters}) == 10
    assert (np.diff(trace.time) >= 0).all()
    assert len(trace) / trace.time[-1] == pytest.approx(generate.RATE, rel=0.1)


# -- a server's own


def test_a_server_records_each_answer_s_adapter_and_goes_on_after_kill_9(
    base_directory: Path, adapter: PeftFiles, tmp_path: Path
) -> None:
    directory = tmp_path / "data"

    def seen() -> list[tuple[str, str, str]]:
        return [(use.version, use.owner, use.tier) for use in recorded(directory / "trace")]

    with process(base_directory, directory) as server:
        user = server.start().user("ann")
        imported = user.import_adapter(adapter, "mine")
        version = imported["current"]
        user.ask(imported["model"])
        user.ask(imported["model"])
        user.ask(BASE)
        first = [(version, "ann", "disk"), (version, "ann", "device")]
        eventually(lambda: seen() == first)
        [nbytes] = {use.nbytes for use in recorded(directory / "trace")}
        assert nbytes == imported["bytes"]
        server.kill()
        again = server.start().user("ann", user.key)
        again.ask(imported["model"])
        eventually(lambda: seen() == [*first, (version, "ann", "disk")])
        admin = {"Authorization": f"Bearer {(directory / 'admin.key').read_text().strip()}"}
        told = httpx.get(f"{server.url}/admin/tiers", headers=admin).json()["trace"]
        assert (told["recorded"], told["dropped"], told["paused"]) == (1, 0, False)
