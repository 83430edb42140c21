"""What memory and cores machine and control groups leave; and a pool that is replaced only where there is enough."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest
import torch

from adapterhub.errors import BadRequest
from adapterhub.swap.cgroup import usable_cores
from adapterhub.swap.memory import available_bytes, give_back_freed
from tests.test_tiers import SIZE, opened

MEMINFO = "MemTotal:       4000 kB\nMemFree:        10 kB\nMemAvailable:   3000 kB\nHugePages_Total: 0\n"


def lay_out(directory: Path, limit: str, current: int) -> tuple[Path, Path]:
    (directory / "meminfo").write_text(MEMINFO)
    (directory / "memory.max").write_text(f"{limit}\n")
    (directory / "memory.current").write_text(f"{current}\n")
    (directory / "memory.stat").write_text("anon 100\ninactive_file 500\n")
    return directory, directory


@pytest.mark.parametrize(
    ("limit", "current", "available"),
    [("max", 10, 3000 * 1024), ("100000", 60000, 40500), ("100000", 200000, 0), ("9999999", 0, 3000 * 1024)],
)
def test_what_is_available_is_the_least_that_machine_and_container_leave(
    tmp_path: Path, limit: str, current: int, available: int
) -> None:
    assert available_bytes(*lay_out(tmp_path, limit, current)) == available


def in_groups(directory: Path, file: str, **said: str) -> tuple[Path, Path]:
    """A process in the group `unit` of the group `slice`, whose `file`s say that, as does that of the `root`."""
    (directory / "self").mkdir()
    (directory / "self/cgroup").write_text("1:name=systemd:/elsewhere\n0::/slice/unit\n")
    (directory / "slice/unit").mkdir(parents=True)
    for group, text in said.items():
        path = {"root": directory, "slice": directory / "slice", "unit": directory / "slice/unit"}[group]
        (path / file).write_text(f"{text}\n")
    return directory, directory


def test_a_group_leaves_no_more_than_those_around_it(tmp_path: Path) -> None:
    lay_out(tmp_path, "max", 10)
    places = in_groups(tmp_path, "memory.max", slice="100000", unit="200000")
    for group in ("slice", "slice/unit"):
        (tmp_path / group / "memory.current").write_text("60000\n")
        (tmp_path / group / "memory.stat").write_text("inactive_file 0\n")
    assert available_bytes(*places) == 40000


@pytest.mark.parametrize(
    ("said", "cores"),
    [
        ({}, 8),
        ({"root": "max 100000"}, 8),
        ({"root": "600000 100000"}, 6),
        ({"root": "900000 100000"}, 8),
        ({"unit": "250000 100000"}, 2),
        ({"unit": "50000 100000"}, 1),
        ({"slice": "300000 100000", "unit": "max 100000"}, 3),
        ({"slice": "300000 100000", "unit": "400000 100000"}, 3),
    ],
)
def test_a_process_uses_the_whole_cores_that_its_groups_have_time_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert usable_cores(*in_groups(tmp_path, "cpu.max", **said)) == cores


def test_where_no_system_says_so_nothing_is_known(tmp_path: Path) -> None:
    assert available_bytes(tmp_path, tmp_path) is None


def test_a_pool_is_not_replaced_where_there_is_no_memory_for_what_stays_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path, extents=4) as store:
        refs = [store.put(seed) for seed in range(3)]
        for ref in refs:
            store.use(ref)
        monkeypatch.setattr("adapterhub.swap.resize.available_bytes", lambda: 2 * SIZE)
        with pytest.raises(BadRequest, match="beside the one that it replaces") as refused:
            store.tiers.set_budgets(8 * SIZE, None).result(0)
        assert "restart the server" in refused.value.message
        assert len(store.on_device()) == 3
        assert store.tiers.stats()["device"]["budget_bytes"] == 4 * SIZE
        store.tiers.set_budgets(2 * SIZE, None).result(0)
        assert store.on_device() == {ref.digest for ref in refs[1:]}, "two of them fit twice"
        for ref in refs:
            store.use(ref)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_what_malloc_keeps_of_what_was_freed_goes_back_to_the_system() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    size = 64 * 1024  # too small for malloc to ask the system for each
    pieces = [torch.ones(size, dtype=torch.uint8) for _ in range(1024)]
    kept = pieces[::16]  # so that what is free lies between
    del pieces
    before = resident()
    give_back_freed()
    assert before - resident() > 32 * 1024**2
    assert all(piece.all() for piece in kept)
