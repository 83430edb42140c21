"""A fine-tuning job: what was asked for, and what has become of it so far.

validating_files ──► queued ──► running ──► succeeded
       │ ▲            │ ▲          │
       ▼ │            ▼ │          ▼        each but the last also ──► failed, cancelled
     paused         paused ◄────────
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Any

from adapterhub.base.model import Base
from adapterhub.errors import WrongBase
from adapterhub.swap.database import Row
from adapterhub.train.dataset import Kind


class Status(StrEnum):
    VALIDATING = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self in (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED)


class Priority(IntEnum):
    """Among those that wait, and for the share of the device among those that run."""

    LOW = 0
    NORMAL = 1
    HIGH = 2


@dataclass(frozen=True)
class Job:
    """`hyperparameters` are those asked for until the files are validated, then those that the training uses."""

    id: str
    owner: str
    status: Status
    model: str
    training_file: str
    suffix: str
    given_suffix: str | None
    seed: int
    hyperparameters: dict[str, Any]
    metadata: dict[str, str] | None
    fingerprint: str
    fine_tuned_model: str | None
    trained_tokens: int | None
    error: dict[str, Any] | None
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    validation_file: str | None
    input_bytes: int  # of both files
    method: Kind
    priority: Priority
    initial: str | None  # the name of the version that the training goes on from
    report: dict[str, Any] | None  # what was found in the files; there as soon as all is prepared on disk
    estimate: dict[str, Any] | None
    proof: dict[str, Any] | None
    result_file: str | None

    @property
    def follows(self) -> bool:
        """Whether it goes on from whatever version its `model`, a bare `owner/name`, means when its turn comes."""
        return self.initial is not None and not self.model.startswith("ft:") and "@" not in self.model

    @classmethod
    def of(cls, row: Row) -> Job:
        texts = ("hyperparameters", "metadata", "error", "report", "estimate", "proof")
        parsed = {k: json.loads(row[k]) if row[k] else None for k in texts}
        kinds = {
            "status": Status(row["status"]),
            "method": Kind(row["method"]),
            "priority": Priority(row["priority"]),
        }
        return cls(**{**row, **parsed, **kinds})


@dataclass(frozen=True)
class Order:
    """What a caller asked for, checked."""

    owner: str
    model: str
    training_file: str
    validation_file: str | None
    input_bytes: int
    suffix: str | None
    seed: int
    method: Kind
    hyperparameters: dict[str, Any]
    priority: Priority
    initial: str | None
    metadata: dict[str, str] | None
    fingerprint: str
    digest: str  # of the request as it came
    key: str | None  # the caller's `Idempotency-Key`, if there was one


@dataclass(frozen=True)
class Note:
    """Progress of a job, as its event and the job itself show it."""

    job: str
    message: str
    data: dict[str, Any]
    trained_tokens: int
    estimated_finish: int


def check_fingerprint(job: Job, base: Base) -> None:
    """Raises WrongBase when the job was made for another base than the server has now."""
    if job.fingerprint != base.fingerprint:
        raise WrongBase(
            f"The job was made for base {job.model} {job.fingerprint[:12]}; the server now runs {base.name} "
            f"{base.fingerprint[:12]}. Create the job again.",
            param="model",
        )
