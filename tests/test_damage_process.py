"""Server processes amid damaged, lost and forbidden files and names that nobody has: whose adapter it is hears of it,
the others are answered, and nothing outside of the data directory is touched."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from tests.serving import PeftFiles, Process, User, process

SIZES = ("--device-bytes", "8MiB", "--kv-bytes", "8MiB")
OBEYS = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]  # even root has to, without those
OPENED = """
import os, sys
def note(event, args):
    if event in ("open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove") and log and args:
        os.write(log, f"{os.fsdecode(args[0])}\\n".encode() if isinstance(args[0], (str, bytes)) else b"")
log = 0
log = os.open(os.environ["OPENED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
sys.addaudithook(note)
"""


def flip(path: Path) -> None:
    """A bit of the first number."""
    whole = bytearray(path.read_bytes())
    whole[8 + int.from_bytes(whole[:8], "little")] ^= 1
    path.write_bytes(whole)


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path, Path], object]] = {
    "truncated": lambda path, other: os.truncate(path, path.stat().st_size - 5),
    "flipped": lambda path, other: flip(path),
    "anothers": lambda path, other: path.write_bytes(other.read_bytes()),
    "deleted": lambda path, other: path.unlink(),
    "directory": lambda path, other: make_directory(path),
    "unreadable": lambda path, other: path.chmod(0),
}


@pytest.fixture(scope="module")
def files(base_model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, PeftFiles]:
    """An adapter for each kind of damage, all of the same shape."""
    directory = tmp_path_factory.mktemp("damaged")
    return {name: PeftFiles(base_model, directory / name, seed=seed) for seed, name in enumerate(DAMAGE)}


def obeying(server: Process, unreadable: Path) -> Process:
    """Runs it as one who may not read what is forbidden."""
    if os.geteuid() == 0:
        unreadable.write_text("secret")
        unreadable.chmod(0)
        tried = subprocess.run([*OBEYS, "cat", str(unreadable)], capture_output=True)
        if b"Permission denied" not in tried.stderr:
            pytest.skip(f"root cannot be kept from reading: {tried.stderr.decode().strip()}")
        server.command = [*OBEYS, *server.command]
    return server.start()


def answer(user: User, name: str) -> tuple[int, str]:
    """Status, and what it says or the error's code."""
    body = {"model": f"{user.owner}/{name}", "prompt": [5, 6, 7], "max_tokens": 6, "temperature": 0}
    got = user.http.post("/v1/completions", json=body)
    said = got.json()
    return got.status_code, said["error"]["code"] if got.is_error else said["choices"][0]["text"]


@pytest.mark.parametrize("stored", [False, True], ids=["without a store", "with a store"])
def test_files_that_go_bad_after_they_were_read_fail_their_owner_or_are_fetched_again(
    base_directory: Path, tmp_path: Path, files: dict[str, PeftFiles], adapter: PeftFiles, stored: bool
) -> None:
    options = ("--store", f"file://{tmp_path / 'store'}") if stored else ()
    with process(base_directory, tmp_path / "data", *SIZES, *options) as made:
        server = obeying(made, tmp_path / "unreadable")
        mira, teo = server.user("mira"), server.user("teo")
        admin = server.user("admin", (server.data_dir / "admin.key").read_text().strip())
        blobs = server.data_dir / "blobs"
        teo.import_adapter(adapter, "other")
        [other] = blobs.iterdir()
        paths, adapters, said = {}, {}, {}
        for name in DAMAGE:
            before = {*blobs.iterdir()}
            adapters[name] = mira.import_adapter(files[name], name)["id"]
            [paths[name]] = {*blobs.iterdir()} - before
            said[name] = answer(mira, name)
        unharmed = answer(teo, "other")
        assert {status for status, _ in (*said.values(), unharmed)} == {200}
        for name, damage in DAMAGE.items():
            admin.http.post(f"/admin/adapters/{adapters[name]}/evict").raise_for_status()
            damage(paths[name], other)
        for name in DAMAGE:
            # a directory, which no repair may remove, is in the way of what the store has
            bad = not stored or name == "directory"
            for _ in range(2):
                assert answer(mira, name) == ((500, "block_damaged") if bad else said[name]), name
            assert answer(teo, "other") == unharmed
        paths["directory"].rmdir()
        if not stored:
            for name in DAMAGE:
                mira.import_adapter(files[name], name)
        assert {name: answer(mira, name) for name in DAMAGE} == said


def unknown_names() -> Iterator[str]:
    for number in range(10_000):
        yield (f"mira/name-{number}", f"../../../{number}", f"/etc/{number}", f"mira/../../{number}", f"{number}\0")[
            number % 5
        ]


def test_ten_thousand_unknown_names_take_no_memory_and_touch_no_path(
    base_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(OPENED)
    opened = tmp_path / "opened"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "hook"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OPENED", str(opened))
    with process(base_directory, tmp_path / "data", *SIZES) as server:
        user = server.start().user("mira")
        names = unknown_names()

        def ask(name: str) -> Any:
            return user.http.post("/v1/completions", json={"model": name, "prompt": [5], "max_tokens": 1}).status_code

        def memory() -> int:
            """KiB."""
            status = Path(f"/proc/{server.pid}/status").read_text()
            return int(status.partition("VmRSS:")[2].split()[0])

        with ThreadPoolExecutor(4) as threads:
            assert {*threads.map(ask, (next(names) for _ in range(2000)))} == {404}
            begun, before = opened.stat().st_size, memory()
            assert {*threads.map(ask, names)} == {404}
        assert memory() - before < 4096
        touched = {Path(line) for line in opened.read_bytes()[begun:].decode().splitlines()}
        assert all(path.is_relative_to(tmp_path / "data") for path in touched), touched
