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
from adapterhub.train.state import RunState
from adapterhub.train.validator import plan_of
from adapterhub.train.workspace import Workspaces


@dataclass(frozen=True)
class Started:
    """A run to be trained; or what was `published` before, where only the last transaction is missing."""

    message: str
    run: Run | None = None
    published: Version | None = None


class Starter:
    def __init__(self, base: Base, registry: Registry, jobs: JobStore, workspaces: Workspaces) -> None:
        self._base = base
        self._registry, self._jobs, self._workspaces = registry, jobs, workspaces

    def start(self, job: Job, tell: Callable[[News], None]) -> Started | None:
        """None when there is nothing prepared in the job's workspace, as after a backup was put back without it.

        Raises WrongBase; ServerFault when a saved state does not fit."""
        check_fingerprint(job, self._base)
        published = self._registry.of_origin(job.owner, job.id)
        if published is not None:
            return Started("All steps were trained before; what came of them is published", published=published)
        workspace = self._workspaces.of(job.id)
        prepared = Prepared.open(workspace.directory)
        if prepared is None:
            return None
        state, initial = self._state(job), workspace.initial()
        plan = plan_of(job, prepared, self._base, initial.meta if initial else None)
        run = Run(self._base, plan, prepared.train, prepared.valid, tell, initial=initial, state=state)
        return Started(_greeting(job, state), run)

    def _state(self, job: Job) -> RunState | None:
        try:
            return RunState.load(self._workspaces.of(job.id).state)
        except FileNotFoundError:
            return None
        except ServerFault as error:
            self._jobs.events.add(job.id, f"{error.message} The training starts from its first step", level="warn")
            return None


def _greeting(job: Job, state: RunState | None) -> str:
    restarted = job.status is Status.RUNNING
    if state is not None:
        return f"{'The server restarted: the' if restarted else 'Fine-tuning'} job goes on after step {state.step}"
    return "The server restarted: the job starts from its first step" if restarted else "Fine-tuning job started"
