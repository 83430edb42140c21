"""What became of a training file: how much there is to learn from, and what was dropped or cut, and where."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from adapterhub.train.dataset import DataSet

_FIRST = 20


@dataclass(frozen=True)
class Found:
    """Items that something was found about, and the line numbers of the first of them."""

    count: int = 0
    lines: tuple[int, ...] = ()

    @classmethod
    def at(cls, lines: Iterable[int]) -> Found:
        """`lines`: of every such item, in order."""
        first: list[int] = []
        count = 0
        for line in lines:
            count += 1
            if len(first) < _FIRST and (not first or first[-1] != line):
                first.append(line)
        return cls(count, tuple(first))

    def __str__(self) -> str:
        if not self.lines:
            return str(self.count)
        more = ", ..." if self.count > len(self.lines) else ""
        return f"{self.count} (line{'s' if len(self.lines) > 1 else ''} {', '.join(map(str, self.lines))}{more})"


@dataclass(frozen=True)
class Part:
    """The items that are trained on, or those that measure how well; and what is not among them."""

    items: int
    tokens: int
    learned: int  # tokens
    duplicates: Found = Found()
    cut: Found = Found()  # to the context; those that had nothing left to learn are also in `empty`
    empty: Found = Found()  # dropped: nothing was left to learn
    same: Found = Found()  # dropped: preferred and non-preferred are alike

    @classmethod
    def of(cls, data: DataSet, **found: Found) -> Part:
        return cls(len(data), data.tokens, data.learned, **found)


@dataclass(frozen=True)
class Report:
    context: int  # tokens
    training: Part
    validation: Part | None = None
    held_out: bool = False  # the validation part was taken out of the training file

    @property
    def json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Report:
        fields = json.loads(text)
        validation = fields["validation"]
        return cls(fields["context"], _part(fields["training"]), validation and _part(validation), fields["held_out"])

    def messages(self) -> list[tuple[str, str]]:
        """(level, text) of what the owner should know, for the job's events."""
        told = list(self._of(self.training, "Training file"))
        if self.validation is None:
            return told
        if self.held_out:
            told.append(("info", f"{self.validation.items} of the examples are held out to measure the loss on"))
            return told
        told += self._of(self.validation, "Validation file")
        if not self.validation.items:
            told.append(("warn", "No example of the validation file is left; the loss on it cannot be measured"))
        return told

    def _of(self, part: Part, file: str) -> Iterable[tuple[str, str]]:
        yield "info", f"{file}: {part.items} examples, {part.tokens} tokens, {part.learned} of them to be learned"
        if part.duplicates.count:
            which = "of earlier ones" if file.startswith("T") else "of earlier ones or of the training file's"
            yield "warn", f"{file}: duplicates {which} were dropped: {part.duplicates}"
        if part.cut.count:
            yield "warn", f"{file}: examples longer than {self.context} tokens were cut: {part.cut}"
        if part.empty.count:
            yield "warn", f"{file}: examples with nothing left to learn were dropped: {part.empty}"
        if part.same.count:
            yield "warn", f"{file}: preferences between two that are the same were dropped: {part.same}"


def _part(fields: dict[str, Any]) -> Part:
    found = {k: Found(v["count"], tuple(v["lines"])) for k, v in fields.items() if isinstance(v, dict)}
    return Part(**{**fields, **found})
