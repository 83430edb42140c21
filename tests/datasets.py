"""Training files and what is in the data sets that are made of them, for tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub.base.text import TextCodec
from adapterhub.train.dataset import DataSet, Example, Kind
from adapterhub.train.prepare import Prepared, prepare

ASK, SAY = {"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A ship's cat."}
ASK2, SAY2 = {"role": "user", "content": "Since when?"}, {"role": "assistant", "content": "Since the storm, I think."}


def chat(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(messages)}


def numbered(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Chats that are all different."""
    return [chat(ASK, {"role": "assistant", "content": f"I am number {i}."}) for i in range(start, start + count)]


def preference(*messages: dict[str, Any], better: str = "Aye, captain.", worse: str = "No.") -> dict[str, Any]:
    return {
        "input": {"messages": list(messages)},
        "preferred_output": [{"role": "assistant", "content": better}],
        "non_preferred_output": [{"role": "assistant", "content": worse}],
    }


def lines(*records: Any) -> bytes:
    """A training file of records, or of raw lines."""
    return b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in records)


class Files:
    """Training files in a directory, and what is prepared of them in others."""

    def __init__(self, directory: Path, codec: TextCodec) -> None:
        self.directory, self.codec = directory, codec
        self.job = directory / "job"

    def prepare(self, training: bytes, validation: bytes | None = None, **how: Any) -> Prepared:
        paths = [self.directory / "training.jsonl"]
        paths[0].write_bytes(training)
        if validation is not None:
            paths.append(self.directory / "validation.jsonl")
            paths[1].write_bytes(validation)
        return self.prepare_at(*paths, **how)

    def prepare_at(
        self,
        training: Path,
        validation: Path | None = None,
        *,
        kind: Kind = Kind.SUPERVISED,
        codec: TextCodec | None = None,
        context: int = 512,
        held_out: float | None = 0.0,
        seed: int = 7,
        on_line: Callable[[], None] = lambda: None,
    ) -> Prepared:
        return prepare(self.job, training, validation, kind, codec or self.codec, context, held_out, seed, on_line)

    @property
    def left(self) -> list[str]:
        """What lies in the job's directory."""
        return sorted(p.name for p in self.job.iterdir()) if self.job.exists() else []


@dataclass
class Listed:
    """An example that can be compared."""

    tokens: list[int]
    learned: list[bool]


def plain(item: tuple[Example, ...]) -> tuple[Listed, ...]:
    return tuple(Listed(e.tokens.tolist(), e.learned.tolist()) for e in item)


def contents(data: DataSet | None) -> list[tuple[Listed, ...]]:
    return [plain(item) for item in data] if data is not None else []
