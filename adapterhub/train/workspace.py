"""What a job has on disk while it is under way: `DATA_DIR/jobs/<id>/`.

Its prepared data (`prepare.py`), the adapter it goes on from, and the state it was saved in last. From its validation
on a job depends on nothing else that a user could delete.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from adapterhub.swap.block import SUFFIX, Block, read_block, write_block


@dataclass(frozen=True)
class Workspace:
    directory: Path

    @property
    def state(self) -> Path:
        return self.directory / "state.safetensors"

    def keep_initial(self, block: Block) -> None:
        """The adapter to go on from, in place of another. Raises StorageFull."""
        self.directory.mkdir(exist_ok=True, mode=0o700)
        kept = write_block(block, self.directory)
        for path in self.directory.glob(f"*{SUFFIX}"):
            if path != kept:
                path.unlink()

    def initial(self) -> Block | None:
        """Raises BlockDamaged."""
        path = next(self.directory.glob(f"*{SUFFIX}"), None)
        return read_block(path) if path else None


class Workspaces:
    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._directory = directory

    def of(self, job: str) -> Workspace:
        return Workspace(self._directory / job)

    def clean_up(self, in_use: Callable[[], Collection[str]]) -> None:
        """Removes all but those of the jobs whose ids `in_use` says, asked after it was seen which there are."""
        paths = list(self._directory.iterdir())
        kept = in_use()
        for path in paths:
            if path.name not in kept:
                shutil.rmtree(path)
