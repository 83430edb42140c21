"""Makes the run of a job from what lies in its workspace: at its first step, or where it was saved last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from adapterhub.base.model import Base
from adapterhub.errors import ServerFault
from adapterhub.swap.registry import Registry
from adapterhub.swap.versions import Version
from adapterhub.train.job import Job, Status, check_fingerprint
from adapterhub.train.jobs import JobStore
from adapterhub.train.news import News
from adapterhub.train.prepare import Prepared
from adapterhub.train.run import Run
from adapterhub.train.state import CopyRoom, RunState
from adapterhub.train.validator import plan_of
from adapterhub.train.workspace import Workspaces

_COPIED_BYTES = 128 * 1024**2  # of states that wait to be written, as two of rank 16 for a base of 135M are


@dataclass(frozen=True)
class Started:
    """A run to be trained; or what was `published` before, where only the last transaction is missing."""

    message: str
    run: Run | None = None
    published: Version | None = None


@dataclass(frozen=True)
class Unprepared:
    """The job has to be validated again; with `files`, these have to be read again, too."""

    message: str
    files: bool


class Starter:
    def __init__(self, registry: Registry, jobs: JobStore, workspaces: Workspaces) -> None:
        self._registry, self._jobs, self._workspaces = registry, jobs, workspaces
        self._copies = CopyRoom(_COPIED_BYTES)

    def start(self, job: Job, base: Base, tell: Callable[[News], None], why: str) -> Started | Unprepared:
        """On that device's `base`; `why` a job that ran already has to start again. Unprepared when there is nothing in
        the job's workspace, as after a backup was put back without it, or another version to go on from than there is.

        Raises WrongBase; ServerFault when a saved state does not fit."""
        check_fingerprint(job, base)
        published = self._registry.of_origin(job.owner, job.id)
        if published is not None:
            return Started("All steps were trained before; what came of them is published", published=published)
        workspace = self._workspaces.of(job.id)
        prepared = Prepared.open(workspace.directory)
        if prepared is None:
            message = "What was prepared for the job is no longer on the server's disk: its files are validated again"
            return Unprepared(message, files=True)
        state = self._state(job)
        if state is None and job.status is Status.QUEUED and (newer := self._newer(job)) is not None:
            return Unprepared(f"{job.model} is now {newer.model}: the job goes on from that", files=False)
        initial = workspace.initial()
        plan = plan_of(job, prepared, base, initial.meta if initial else None)
        data = prepared.train, prepared.valid
        run = Run(base, plan, *data, tell, initial=initial, state=state, copies=self._copies)
        return Started(_greeting(job, state, why), run)

    def _newer(self, job: Job) -> Version | None:
        """What the job's model means now, where that is not what it was validated with."""
        current = self._registry.resolve(job.owner, job.model) if job.follows else None
        return current if current is not None and current.model != job.initial else None

    def _state(self, job: Job) -> RunState | None:
        try:
            return RunState.load(self._workspaces.of(job.id).state)
        except FileNotFoundError:
            return None
        except ServerFault as error:
            self._jobs.events.add(job.id, f"{error.message} The training starts from its first step", level="warn")
            return None


def _greeting(job: Job, state: RunState | None, why: str) -> str:
    restarted = job.status is Status.RUNNING
    if state is not None:
        return f"{f'{why}: the' if restarted else 'Fine-tuning'} job goes on after step {state.step}"
    if restarted:
        return f"{why}: the job starts from its first step"
    return f"Fine-tuning job started from {job.initial}" if job.initial else "Fine-tuning job started"
