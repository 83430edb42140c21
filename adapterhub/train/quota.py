"""What training asks of whoever counts how many bytes an owner keeps. Whoever that is reads what a job will make from
the job's `estimate`, and counts it until the job has ended."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol


class Room(Protocol):
    """Everything raises QuotaExceeded."""

    def check_bytes(self, owner: str, nbytes: int, *, job: str) -> None:
        """Whether so many may come of the `job`; to be asked in the transaction that says that they will."""
        ...

    def taken(self, owner: str, nbytes: int, *, job: str | None = None) -> AbstractContextManager[None]:
        """While so many bytes are written; as what the `job` will make, if one is named, and beside that otherwise."""
        ...
