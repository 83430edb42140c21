"""Tokenized training data on disk: one memory-mapped file for a data set, so that its size costs no memory.

The file holds the examples one after the other (their tokens as int32, then a byte a token that says whether it is
learned, padded to four bytes), then the index (`_ENTRY`, one for each example), then `_FOOTER`, which says what there
is. All numbers are little-endian. It is written from the start to the end, and has its name once it is whole.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO

import numpy as np

from adapterhub.errors import ServerFault
from adapterhub.swap.files import becoming

_MAGIC = b"ahdata01"
_FOOTER = struct.Struct("<8sqqq")  # magic, examples in an item, items, where the index begins
_ENTRY = np.dtype([("start", "<i8"), ("tokens", "<i4"), ("learned", "<i4")])  # where an example begins, and its counts
_BUFFER = 1024**2


class Kind(StrEnum):
    SUPERVISED = "supervised"
    DPO = "dpo"

    @property
    def sides(self) -> int:
        """Examples that make up an item: one, or what is preferred and what is not."""
        return 2 if self is Kind.DPO else 1


@dataclass(frozen=True, eq=False)
class Example:
    """`learned[i]` says whether token i is to be learned, given those before it: `learned[0]` never counts."""

    tokens: np.ndarray  # int32 [n]
    learned: np.ndarray  # bool [n]


class DataSet:
    """Items in the order in which they were written. Read-only; safe to use from several threads."""

    def __init__(self, kind: Kind, data: np.ndarray, index: np.ndarray) -> None:
        """`data`: uint8, what the index tells places of. `index`: `_ENTRY` [items, sides]."""
        self.kind = kind
        self._data = data
        self._index = index
        self.lengths: np.ndarray = index["tokens"].sum(axis=1, dtype=np.int64)  # [items], all sides of each
        self.learned_counts: np.ndarray = index["learned"].sum(axis=1, dtype=np.int64)  # [items], likewise
        self.tokens = int(self.lengths.sum())
        self.learned = int(self.learned_counts.sum())

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> tuple[Example, ...]:
        """One example; for DPO (preferred, non-preferred). Raises IndexError."""
        return tuple(self._example(int(start), int(tokens)) for start, tokens, _ in self._index[i])

    def __iter__(self) -> Iterator[tuple[Example, ...]]:
        return (self[i] for i in range(len(self)))

    def _example(self, start: int, tokens: int) -> Example:
        middle = start + 4 * tokens
        learned = self._data[middle : middle + tokens].view(np.bool_)
        return Example(self._data[start:middle].view("<i4"), learned)

    @classmethod
    def open(cls, directory: Path, name: str) -> DataSet:
        """`name`: "train" or "valid". Raises FileNotFoundError, or ServerFault when the file is not whole."""
        path = data_path(directory, name)
        size = path.stat().st_size
        data = _mapped(path) if size >= _FOOTER.size else np.zeros(_FOOTER.size, np.uint8)
        magic, sides, items, index_at = _FOOTER.unpack(data[-_FOOTER.size :].tobytes())
        if magic != _MAGIC or len(data) != index_at + items * sides * _ENTRY.itemsize + _FOOTER.size:
            raise ServerFault(
                f"The prepared training data {directory.name}/{path.name} is damaged. Create the job again.",
                code="training_data_damaged",
            )
        index = data[index_at : -_FOOTER.size].view(_ENTRY).reshape(items, sides)
        return cls(Kind.SUPERVISED if sides == 1 else Kind.DPO, data, index)

    @classmethod
    def of(cls, kind: Kind, items: Iterable[tuple[Example, ...]], directory: Path, name: str) -> DataSet:
        """Writes a data set, synced, in place of one that has this name, and opens it.

        Raises StorageFull; then, as with whatever `items` raises, nothing is left behind.
        """
        with writing(kind, directory, name) as writer:
            for item in items:
                writer.add(item)
            writer.finish(np.ones(writer.items, np.bool_))
        return cls.open(directory, name)


class Writer:
    """Takes the items of a data set one by one; holds 16 bytes in memory for each example."""

    def __init__(self, kind: Kind, path: Path, file: BinaryIO) -> None:
        self.kind = kind
        self._path, self._file = path, file
        self._at = 0
        self._entries = bytearray()

    @property
    def items(self) -> int:
        """That were added so far."""
        return len(self._entries) // (_ENTRY.itemsize * self.kind.sides)

    def add(self, item: tuple[Example, ...]) -> None:
        assert len(item) == self.kind.sides
        for example in item:
            n = len(example.tokens)
            assert len(example.learned) == n
            written = example.tokens.astype("<i4", copy=False).tobytes() + example.learned.tobytes()
            self._file.write(written + b"\0" * (-n % 4))
            self._entries += struct.pack("<qii", self._at, n, int(example.learned[1:].sum()))
            self._at += 4 * n + n + -n % 4

    def added(self) -> DataSet:
        """What was added so far."""
        self._file.flush()
        data = _mapped(self._path) if self._at else np.zeros(0, np.uint8)
        return DataSet(self.kind, data, self._index())

    def finish(self, kept: np.ndarray) -> None:
        """Writes the index, of the items alone that `kept` (bool [items]) says."""
        padding = -self._at % 8
        index = self._index()[kept]
        self._file.write(b"\0" * padding)
        self._file.write(index.tobytes())
        self._file.write(_FOOTER.pack(_MAGIC, self.kind.sides, len(index), self._at + padding))

    def _index(self) -> np.ndarray:
        return np.frombuffer(bytes(self._entries), _ENTRY).reshape(-1, self.kind.sides)


@contextmanager
def writing(kind: Kind, directory: Path, name: str) -> Iterator[Writer]:
    """A writer whose data set has its name, synced, at the end of the block; finish it before. Raises StorageFull.

    If the block raises, nothing is left behind.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    with becoming(data_path(directory, name)) as partial, partial.open("xb", buffering=_BUFFER) as file:
        yield Writer(kind, partial, file)


def _mapped(path: Path) -> np.ndarray:
    return np.asarray(np.memmap(path, np.uint8, mode="r"))


def data_path(directory: Path, name: str) -> Path:
    return directory / f"{name}.data"
