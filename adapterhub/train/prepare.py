"""Training files to data sets on disk, in memory that does not grow with their texts; and what was dropped."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from adapterhub.base.text import TextCodec
from adapterhub.errors import BadRequest, ServerFault
from adapterhub.swap.files import remove_partials, sync_directory, write_durably
from adapterhub.train.dataset import DataSet, Example, Kind, Writer, data_path, writing
from adapterhub.train.records import Source, read_records
from adapterhub.train.report import Found, Part, Report
from adapterhub.train.tokenize import tokenize

MIN_EXAMPLES = 10
_TRAIN, _VALID, _REPORT = "train", "valid", "report.json"
_DIGEST_BYTES = 16
# where held_out is left to us
_HELD_OUT = 0.05
_HELD_OUT_FROM = 100  # examples; a smaller set needs them all
_HELD_OUT_MOST = 64  # tell a loss well enough, and measuring stays cheap


@dataclass(frozen=True)
class Prepared:
    train: DataSet
    valid: DataSet | None
    report: Report

    @classmethod
    def open(cls, directory: Path) -> Prepared | None:
        """What `prepare` has made in `directory`; None if it has not, or not to the end, or if a file is damaged."""
        try:
            report = Report.parse((directory / _REPORT).read_text())
            measured = report.validation is not None and report.validation.items > 0
            valid = DataSet.open(directory, _VALID) if measured else None
            return cls(DataSet.open(directory, _TRAIN), valid, report)
        except (FileNotFoundError, ServerFault, ValueError, LookupError):
            return None


def prepare(
    directory: Path,
    training: Path,
    validation: Path | None,
    kind: Kind,
    codec: TextCodec,
    context: int,
    held_out: float | None,
    seed: int,
    on_line: Callable[[], None] = lambda: None,
) -> Prepared:
    """Reads and tokenizes the files; examples are cut to `context` tokens, and duplicates dropped.

    `held_out`: the share of the examples that is taken out of the training file to measure the loss on, chosen by
    `seed`; None leaves that to us. `on_line` is called every 128 KiB of text or so; what it raises ends it.
    Raises InvalidTrainingFile, with the line and the reason; BadRequest when `held_out` comes with a validation file;
    StorageFull; FileNotFoundError when a file is gone. At any moment `directory` holds all that is prepared, or for
    `Prepared.open` nothing; nobody else may write there meanwhile.
    """
    if validation is not None and held_out:
        raise BadRequest(
            f"held_out is {held_out:g}, and there is a validation file; give one of the two.", param="held_out"
        )
    reader = _Reader(codec, context, on_line)
    _discard(directory)
    try:
        report = _write(directory, training, validation, kind, reader, held_out, seed)
        write_durably(directory / _REPORT, report.json.encode())  # from here on it is prepared
    except BaseException:
        _discard(directory)
        raise
    prepared = Prepared.open(directory)
    assert prepared is not None
    return prepared


def _write(
    directory: Path,
    training: Path,
    validation: Path | None,
    kind: Kind,
    reader: _Reader,
    held_out: float | None,
    seed: int,
) -> Report:
    part = None
    with writing(kind, directory, _TRAIN) as train:
        found = reader.gather(train, Source(training, "training_file"))
        found.check(MIN_EXAMPLES)
        repeated = _repeated(found.digests)
        kept = ~repeated
        if validation is not None:
            part = _validate(kind, directory, Source(validation, "validation_file"), reader, found)
        elif (taken := _taken(found.lines, kept, held_out, seed)).any():
            added = train.added()
            part = Part.of(DataSet.of(kind, (added[i] for i in np.flatnonzero(taken).tolist()), directory, _VALID))
            kept &= ~taken
        train.finish(kept)
    data = DataSet.open(directory, _TRAIN)
    return Report(reader.context, found.part(data, repeated), part, held_out=validation is None and part is not None)


def _validate(kind: Kind, directory: Path, source: Source, reader: _Reader, training: _Gathered) -> Part:
    """Writes what the validation file has that the training file has not."""
    with writing(kind, directory, _VALID) as valid:
        found = reader.gather(valid, source)
        found.check(1)
        repeated = _repeated(training.digests + found.digests)[len(training.lines) :]
        valid.finish(~repeated)
    return found.part(DataSet.open(directory, _VALID), repeated)


@dataclass
class _Gathered:
    """What came out of a file: of each item that was written its line and digest, and the lines of those of note."""

    source: Source
    records: int = 0
    lines: array[int] = field(default_factory=lambda: array("i"))
    digests: bytearray = field(default_factory=bytearray)
    cut: array[int] = field(default_factory=lambda: array("i"))
    empty: array[int] = field(default_factory=lambda: array("i"))
    same: array[int] = field(default_factory=lambda: array("i"))

    def check(self, least: int) -> None:
        if self.records < least:
            raise self.source.invalid(
                f"{self.source.noun.capitalize()} has {self.records} example(s), but must have at least {least} "
                f"example{'s' if least > 1 else ''}",
                code="invalid_n_examples",
            )
        if not self.lines:
            raise self.source.invalid(f"No example of the {self.source.noun} has anything left to learn.")

    def part(self, data: DataSet, repeated: np.ndarray) -> Part:
        return Part.of(
            data,
            duplicates=Found.at(np.frombuffer(self.lines, np.int32)[repeated].tolist()),
            cut=Found.at(self.cut),
            empty=Found.at(self.empty),
            same=Found.at(self.same),
        )


@dataclass(frozen=True)
class _Reader:
    codec: TextCodec
    context: int
    on_line: Callable[[], None]

    def gather(self, writer: Writer, source: Source) -> _Gathered:
        """Writes every item of the file that has something to learn, duplicates too."""
        found = _Gathered(source)
        last = 0
        for items in tokenize(read_records(source, writer.kind), self.codec, self.context):
            self.on_line()
            for item in items:
                found.records += item.line != last
                last = item.line
                if item.cut:
                    found.cut.append(item.line)
                if item.empty:
                    found.empty.append(item.line)
                elif item.same:
                    found.same.append(item.line)
                else:
                    writer.add(item.examples)
                    found.lines.append(item.line)
                    found.digests += _digest(item.examples)
        return found


def _digest(examples: tuple[Example, ...]) -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for example in examples:
        digest.update(len(example.tokens).to_bytes(8, "little"))
        digest.update(example.tokens.tobytes())
        digest.update(example.learned.tobytes())
    return digest.digest()


def _repeated(digests: bytearray) -> np.ndarray:
    """bool [items]: which of them are the same as one before."""
    halves = np.frombuffer(digests, np.uint64).reshape(-1, 2)
    order = np.lexsort((halves[:, 0], halves[:, 1]))  # stable: the first of those that are the same comes first
    ordered = halves[order]
    repeated = np.zeros(len(halves), np.bool_)
    repeated[order[1:]] = (ordered[1:] == ordered[:-1]).all(axis=1)
    return repeated


def _taken(lines: array[int], kept: np.ndarray, share: float | None, seed: int) -> np.ndarray:
    """bool [items]: which of the kept ones are held out. Those of one line stay together: they share a conversation."""
    taken = np.zeros(len(kept), np.bool_)
    items = np.flatnonzero(kept)
    if share is None:
        wanted = min(round(len(items) * _HELD_OUT), _HELD_OUT_MOST) if len(items) >= _HELD_OUT_FROM else 0
    else:
        wanted = min(round(len(items) * share), len(items) - 1)
    if not wanted:
        return taken
    _, starts, counts = np.unique(np.frombuffer(lines, np.int32)[items], return_index=True, return_counts=True)
    for group in np.random.default_rng(seed).permutation(len(starts)):
        if counts[group] <= wanted:
            taken[items[starts[group] : starts[group] + counts[group]]] = True
            wanted -= counts[group]
        if not wanted:
            break
    return taken


def _discard(directory: Path) -> None:
    """What an earlier attempt has left, its report first."""
    if not directory.exists():
        return
    for path in (directory / _REPORT, data_path(directory, _TRAIN), data_path(directory, _VALID)):
        path.unlink(missing_ok=True)
        sync_directory(directory)
    remove_partials(directory)
