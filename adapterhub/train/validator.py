"""Takes jobs from `validating_files` to `queued`: reads and tokenizes their files, and fills in what was left to us.

When a job is queued, all that its training needs lies in its workspace, and what it will make counts among what its
owner keeps.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from adapterhub.base.fleet import Fleet
from adapterhub.base.model import Base
from adapterhub.base.share import PieceCosts
from adapterhub.base.text import TextCodec
from adapterhub.config import MIB
from adapterhub.errors import HubError, InvalidTrainingFile, NotFound, ServerFault, WrongBase
from adapterhub.swap.block import BlockMeta
from adapterhub.swap.database import Database
from adapterhub.swap.registry import Registry
from adapterhub.train.estimate import Estimate, estimate
from adapterhub.train.files import FileStore
from adapterhub.train.job import Job, Status, check_fingerprint
from adapterhub.train.jobs import JobStore
from adapterhub.train.plan import Plan, make_plan, target_layout
from adapterhub.train.prepare import Prepared, prepare
from adapterhub.train.quota import Room
from adapterhub.train.workspace import Workspaces

log = logging.getLogger(__name__)
_PAUSE_SECONDS = 2
_SMALL_BYTES = 4 * MIB  # a few seconds


@dataclass(frozen=True)
class _Initial:
    """What a job goes on from."""

    model: str
    meta: BlockMeta


class _Interrupted(Exception):
    """The job was paused or cancelled, or the server stops: what is done for the job has no more use now."""


class Validator:
    """Two threads, of which one takes small files alone, so that nobody waits minutes for somebody else's large one.
    `wake` it after a job has come into `validating_files` or left it."""

    def __init__(
        self,
        engine: Fleet,
        codec: TextCodec,
        database: Database,
        registry: Registry,
        files: FileStore,
        jobs: JobStore,
        workspaces: Workspaces,
        room: Room,
        costs: Sequence[PieceCosts],
    ) -> None:
        """`costs`: what training costs, on each device."""
        self._base, self._context, self._codec = engine.base, engine.context, codec
        self._database, self._registry = database, registry
        self._files, self._jobs, self._workspaces, self._room = files, jobs, workspaces, room
        self._costs = costs
        self._changed = threading.Condition()
        self._stopping = False
        self._taken: set[str] = set()  # jobs that are being validated
        self._threads = [
            threading.Thread(target=self._loop, args=(most,), name=f"adapterhub-validator-{name}", daemon=True)
            for name, most in (("any", None), ("small", _SMALL_BYTES))
        ]

    def start(self, on_done: Callable[[], None]) -> None:
        """`on_done` is called after a job was validated, has failed, or was cancelled meanwhile: others may have waited
        for it, and what it had on disk may go."""
        self._on_done = on_done
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """What is being validated will be validated from its first line at the next start."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    @property
    def taken(self) -> set[str]:
        """The ids of the jobs that are being validated."""
        with self._changed:
            return set(self._taken)

    def busy(self, jobs: Collection[str]) -> bool:
        """Whether one of those jobs, by their ids, is being validated."""
        return not self.taken.isdisjoint(jobs)

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _loop(self, most_bytes: int | None) -> None:
        while (job := self._next(most_bytes)) is not None:
            try:
                self._attempt(job)
            except Exception:  # not even the failure can be written down, as on a full disk
                log.exception("jobs cannot be validated; trying again in %d s", _PAUSE_SECONDS)
                with self._changed:
                    self._changed.wait_for(lambda: self._stopping, _PAUSE_SECONDS)
            finally:
                with self._changed:
                    self._taken.remove(job.id)
                self._on_done()

    def _next(self, most_bytes: int | None) -> Job | None:
        """Waits for a job to validate, and takes it; None when the server stops."""
        with self._changed:
            while not self._stopping:
                job = self._jobs.next_to_validate(most_bytes, self._taken)
                if job is not None:
                    self._taken.add(job.id)
                    return job
                self._changed.wait()
        return None

    def _attempt(self, job: Job) -> None:
        try:
            self._validate(job)
        except _Interrupted:
            return
        except HubError as error:
            self._jobs.fail(job, error)
        except Exception as error:
            if self._waits(job):  # otherwise its workspace went away under it
                log.exception("job %s cannot be validated", job.id)
                self._jobs.fail(job, unexpected(error))

    def _validate(self, job: Job) -> None:
        check_fingerprint(job, self._base)
        initial = self._initial(job)
        prepared = self._prepare(job)
        plan = plan_of(job, prepared, self._base, initial.meta if initial else None)
        costs = next((costs for costs in self._costs if costs.known), None)
        nbytes = target_layout(plan, self._base.layout).numel(plan.rank) * self._base.dtype.itemsize
        expected = estimate(prepared.train, prepared.valid, plan, costs, nbytes, going_on=initial is not None)
        with self._database.transaction():
            if not self._waits(job):
                return
            self._room.check_bytes(job.owner, nbytes, job=job.id)
            for level, message in self._told(job, prepared, _outlook(plan, prepared, expected)):
                self._jobs.events.add(job.id, message, level=level)
            self._jobs.move(
                job,
                Status.QUEUED,
                "Files validated, moving job to queued state" if job.report is None else "Moving job to queued state",
                hyperparameters=json.dumps(plan.hyperparameters),
                report=prepared.report.json,
                estimate=json.dumps(asdict(expected)),
                initial=initial.model if initial else None,
            )

    def _told(self, job: Job, prepared: Prepared, outlook: str) -> list[tuple[str, str]]:
        """What the job's events say, with their levels; nothing when its files were validated before."""
        if job.report is not None:
            return []
        told = [*prepared.report.messages(), ("info", outlook)]
        if awaited := self._jobs.awaited(job):
            told.append(("info", f"The job waits for {', '.join(awaited)}, and goes on from what {job.model} is then"))
        return told

    def _initial(self, job: Job) -> _Initial | None:
        """Sets aside the adapter that the job goes on from: what its name means now, or the version that it names."""
        if job.initial is None:
            return None
        version = self._registry.resolve(job.owner, job.model if job.follows else job.initial)
        if version is None:
            message = f"The model {job.model} was deleted before the job could go on from it."
            raise NotFound(message, param="model", code="model_not_found")
        if version.fingerprint != self._base.fingerprint:
            message = f"{job.model} is now {version.model}, which was made for another base."
            raise WrongBase(message, param="model")
        block = self._registry.block(version)
        self._workspaces.of(job.id).keep_initial(block)
        return _Initial(version.model, block.meta)

    def _prepare(self, job: Job) -> Prepared:
        directory = self._workspaces.of(job.id).directory
        there = Prepared.open(directory)  # by an attempt that was ended between having prepared it and saying so
        if there is not None:
            return there
        held_out = job.hyperparameters.get("held_out")
        training = self._path(job, "training_file")
        validation = self._path(job, "validation_file") if job.validation_file else None
        try:
            return prepare(
                directory,
                training,
                validation,
                job.method,
                self._codec,
                self._context,
                None if held_out == "auto" else held_out,
                job.seed,
                lambda: self._go_on(job),
            )
        except FileNotFoundError:
            for param in ("training_file", "validation_file") if job.validation_file else ("training_file",):
                self._path(job, param)
            raise

    def _path(self, job: Job, param: str) -> Path:
        """Raises InvalidTrainingFile when the file has been deleted."""
        file = getattr(job, param)
        try:
            return self._files.path(self._files.get(job.owner, file).id)
        except NotFound as error:
            message = f"The {param.replace('_', ' ')} {file} was deleted before the job could read it."
            raise InvalidTrainingFile(message, param=param, code=f"invalid_{param}") from error

    def _go_on(self, job: Job) -> None:
        if self._stopping or not self._waits(job):
            raise _Interrupted

    def _waits(self, job: Job) -> bool:
        return self._jobs.get(None, job.id).status is Status.VALIDATING


def plan_of(job: Job, prepared: Prepared, base: Base, initial: BlockMeta | None) -> Plan:
    """The same each time: what a plan has chosen is asked for when it is made again."""
    return make_plan(
        job.hyperparameters,
        job.seed,
        len(prepared.train),
        base.layout,
        job.method,
        width=base.width,
        valid_items=len(prepared.valid) if prepared.valid else 0,
        initial=initial,
    )


def _outlook(plan: Plan, prepared: Prepared, expected: Estimate) -> str:
    steps = plan.steps(len(prepared.train))
    return f"{steps} steps in {plan.n_epochs} epoch(s) with batch size {plan.batch_size}: {expected.message}"


def unexpected(error: Exception) -> ServerFault:
    return ServerFault(f"The server met an unexpected error: {error}")
