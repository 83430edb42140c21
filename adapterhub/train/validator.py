"""Takes jobs from `validating_files` to `queued`: reads and tokenizes their files, and fills in what was left to us.

When a job is queued, all that its training needs lies in its workspace.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path

from adapterhub.base.engine import Engine
from adapterhub.base.model import Base
from adapterhub.base.text import TextCodec
from adapterhub.config import MIB
from adapterhub.errors import HubError, InvalidTrainingFile, NotFound, ServerFault
from adapterhub.swap.block import BlockMeta
from adapterhub.swap.database import Database
from adapterhub.swap.registry import Registry
from adapterhub.train.estimate import Estimate, estimate
from adapterhub.train.files import FileStore
from adapterhub.train.job import Job, Status, check_fingerprint
from adapterhub.train.jobs import JobStore
from adapterhub.train.plan import Plan, make_plan
from adapterhub.train.prepare import Prepared, prepare
from adapterhub.train.workspace import Workspaces

log = logging.getLogger(__name__)
_PAUSE_SECONDS = 2
_SMALL_BYTES = 4 * MIB  # a few seconds


class _Interrupted(Exception):
    """The job was paused or cancelled, or the server stops: what is done for the job has no more use now."""


class Validator:
    """Two threads, of which one takes small files alone, so that nobody waits minutes for somebody else's large one.
    `wake` it after a job has come into `validating_files` or left it."""

    def __init__(
        self,
        engine: Engine,
        codec: TextCodec,
        database: Database,
        registry: Registry,
        files: FileStore,
        jobs: JobStore,
        workspaces: Workspaces,
    ) -> None:
        self._base, self._context, self._codec = engine.base, engine.context, codec
        self._database, self._registry = database, registry
        self._files, self._jobs, self._workspaces = files, jobs, workspaces
        self._changed = threading.Condition()
        self._stopping = False
        self._taken: set[str] = set()  # jobs that are being validated
        self._threads = [
            threading.Thread(target=self._loop, args=(most,), name=f"adapterhub-validator-{name}", daemon=True)
            for name, most in (("any", None), ("small", _SMALL_BYTES))
        ]

    def start(self, on_queued: Callable[[], None]) -> None:
        """`on_queued` is called after a job was validated."""
        self._on_queued = on_queued
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """What is being validated will be validated from its first line at the next start."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def busy(self, jobs: Collection[str]) -> bool:
        """Whether one of those jobs, by their ids, is being validated."""
        with self._changed:
            return not self._taken.isdisjoint(jobs)

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
            pass
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
        plan = plan_of(job, prepared, self._base, initial)
        rate = (self._jobs.events.last_metrics() or {}).get("tokens_per_second")
        expected = estimate(prepared.train, prepared.valid, plan, rate)
        with self._database.transaction():
            if not self._waits(job):
                return
            for level, message in [*prepared.report.messages(), ("info", _outlook(plan, prepared, expected))]:
                self._jobs.events.add(job.id, message, level=level)
            self._jobs.move(
                job,
                Status.QUEUED,
                "Files validated, moving job to queued state",
                hyperparameters=json.dumps(plan.hyperparameters),
                report=prepared.report.json,
                estimate=json.dumps(asdict(expected)),
            )
        self._on_queued()

    def _initial(self, job: Job) -> BlockMeta | None:
        """Sets aside the adapter that the job goes on from."""
        if job.initial is None:
            return None
        try:
            block = self._registry.block(self._registry.version(job.owner, job.initial))
        except NotFound as error:
            message = f"The model {job.model} was deleted before the job could go on from it."
            raise NotFound(message, param="model", code="model_not_found") from error
        self._workspaces.of(job.id).keep_initial(block)
        return block.meta

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
        valid_items=len(prepared.valid) if prepared.valid else 0,
        initial=initial,
    )


def _outlook(plan: Plan, prepared: Prepared, expected: Estimate) -> str:
    steps = plan.steps(len(prepared.train))
    return f"{steps} steps in {plan.n_epochs} epoch(s) with batch size {plan.batch_size}: {expected.message}"


def unexpected(error: Exception) -> ServerFault:
    return ServerFault(f"The server met an unexpected error: {error}")
