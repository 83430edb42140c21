"""What memory there is, by the machine and by the container; and a pool that is replaced only where there is enough."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from adapterhub.errors import BadRequest
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
