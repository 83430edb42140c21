"""A data set on disk gives back every item that was written, and is whole or not there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.errors import ServerFault
from adapterhub.train.dataset import DataSet, Example, Kind
from tests.datasets import contents, plain


def example(tokens: list[int], learned: list[bool]) -> Example:
    return Example(np.array(tokens, np.int32), np.array(learned, np.bool_))


def some(count: int, kind: Kind = Kind.SUPERVISED, seed: int = 0) -> list[tuple[Example, ...]]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 30, (count, kind.sides))
    return [
        tuple(Example(rng.integers(0, 50_000, n).astype(np.int32), rng.random(n) < 0.5) for n in sides)
        for sides in lengths
    ]


@st.composite
def examples(draw: st.DrawFn) -> Example:
    tokens = draw(st.lists(st.integers(0, 2**31 - 1), max_size=20))
    return example(tokens, draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens))))


@given(data=st.data(), kind=st.sampled_from(Kind))
def test_what_was_written_comes_back(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: Kind) -> None:
    items = data.draw(st.lists(st.tuples(*[examples()] * kind.sides), max_size=12))
    directory = tmp_path_factory.getbasetemp() / "any"
    found = DataSet.of(kind, items, directory, "train")
    assert contents(found) == contents(DataSet.open(directory, "train")) == [plain(item) for item in items]
    assert (found.kind, len(found)) == (kind, len(items))
    assert found.lengths.dtype == np.int64
    assert found.lengths.tolist() == [sum(len(e.tokens) for e in item) for item in items]
    assert found.tokens == sum(len(e.tokens) for item in items for e in item)
    assert found.learned == sum(int(e.learned[1:].sum()) for item in items for e in item)
    with pytest.raises(IndexError):
        found[len(items)]


def test_tokens_and_mask_are_views_that_nobody_can_write_to(tmp_path: Path) -> None:
    [found] = DataSet.of(Kind.SUPERVISED, some(1), tmp_path, "train")[0]
    assert (found.tokens.dtype, found.learned.dtype) == (np.int32, np.bool_)
    for array in (found.tokens, found.learned):
        assert not array.flags.owndata
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_a_data_set_stays_readable_when_its_file_is_removed_or_replaced(tmp_path: Path) -> None:
    items = some(50)
    old = DataSet.of(Kind.SUPERVISED, items, tmp_path, "train")
    new = DataSet.of(Kind.SUPERVISED, some(20, seed=1), tmp_path, "train")
    (tmp_path / "train.data").unlink()
    assert contents(old) == [plain(item) for item in items]
    assert len(new) == 20


def test_what_the_items_raise_leaves_nothing_behind_and_the_old_data_set_as_it_was(tmp_path: Path) -> None:
    class Stop(Exception): ...

    def interrupted() -> Iterator[tuple[Example, ...]]:
        yield from some(100)
        raise Stop

    DataSet.of(Kind.SUPERVISED, some(3), tmp_path, "train")
    with pytest.raises(Stop):
        DataSet.of(Kind.SUPERVISED, interrupted(), tmp_path, "train")
    assert [p.name for p in tmp_path.iterdir()] == ["train.data"]
    assert len(DataSet.open(tmp_path, "train")) == 3


def test_a_file_that_is_cut_off_anywhere_or_is_something_else_is_refused(tmp_path: Path) -> None:
    DataSet.of(Kind.DPO, some(2, Kind.DPO), tmp_path, "train")
    path = tmp_path / "train.data"
    whole = path.read_bytes()
    for content in (*(whole[:n] for n in range(len(whole))), whole + b"\0", b"{}" * 1000, whole[::-1]):
        path.write_bytes(content)
        with pytest.raises(ServerFault, match="damaged"):
            DataSet.open(tmp_path, "train")
    path.unlink()
    with pytest.raises(FileNotFoundError):
        DataSet.open(tmp_path, "train")


FULL = """
import resource, sys
from pathlib import Path
from adapterhub.errors import StorageFull
from adapterhub.train.dataset import DataSet, Kind
from tests.test_dataset import some

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    DataSet.of(Kind.SUPERVISED, some(20_000), Path(sys.argv[1]), "train")
except StorageFull:
    print("full")
"""


def test_a_full_disk_says_so_and_leaves_nothing_behind(tmp_path: Path) -> None:
    DataSet.of(Kind.SUPERVISED, some(20_000), tmp_path, "train")
    size = (tmp_path / "train.data").stat().st_size
    for limit in (0, 1024, size // 2, size * 9 // 10, size - 1):  # in the examples, in the index, in the last bytes
        job = tmp_path / "job"
        command = [sys.executable, "-c", FULL, job, str(limit)]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "full\n"
        assert list(job.iterdir()) == []
