"""Runs the jobs that are queued, as many at once as there are places, and writes down what they tell.

One thread hears the news of all runs, and starts and takes out runs. It never waits for a block or a state to be
written: that is what lanes are for. A job's status in the database is what counts: a run whose job is no longer
`running` is taken out; one that was `running` when the server ended goes on at the next start from the state it was
saved in last.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import partial
from queue import Empty, SimpleQueue
from typing import ParamSpec

from adapterhub.errors import HubError
from adapterhub.train.cotrainer import CoTrainer
from adapterhub.train.job import Job, Priority, Status
from adapterhub.train.jobs import JobStore
from adapterhub.train.lanes import Lanes
from adapterhub.train.news import Checkpoint, News, Progress, Saved, Snapshot, Trained
from adapterhub.train.progress import note_of
from adapterhub.train.publish import Publisher
from adapterhub.train.run import Run
from adapterhub.train.starter import Starter
from adapterhub.train.validator import unexpected
from adapterhub.train.workspace import Workspaces

log = logging.getLogger(__name__)
_PAUSE_SECONDS = 2
_STOP_SECONDS = 30  # for the engine to hand over the last states
_WRITERS = 2
P = ParamSpec("P")
_WEIGHTS = {Priority.LOW: 0.5, Priority.NORMAL: 1.0, Priority.HIGH: 2.0}


class _Phase(Enum):
    TRAINING = auto()
    LEAVING = auto()  # the run was asked for its last state
    ENDED = auto()  # the run tells nothing more that counts; what came of it may still be written


@dataclass(eq=False)
class _Active:
    """A job that has a place."""

    job: Job  # as it was when it was started
    run: Run | None = None  # None: it had been trained before
    phase: _Phase = _Phase.TRAINING
    snapshot: Snapshot | None = None  # the newest that is not saved yet


@dataclass(frozen=True)
class _Heard:
    active: _Active
    news: News


@dataclass(frozen=True)
class _Left:
    """The place is free; `error`: why the job fails."""

    active: _Active
    error: HubError | None = None


@dataclass(frozen=True)
class _Look:
    """Something is new in the database."""


class Conductor:
    """`wake` it after a job was queued, or was taken from `queued` or `running` by somebody else."""

    def __init__(
        self,
        trainer: CoTrainer,
        jobs: JobStore,
        workspaces: Workspaces,
        starter: Starter,
        publisher: Publisher,
        *,
        places: int,
        owner_places: int,
    ) -> None:
        """`places`: jobs that run at once; `owner_places`: of them those of one owner."""
        self._trainer, self._jobs, self._workspaces = trainer, jobs, workspaces
        self._starter, self._publisher = starter, publisher
        self._places, self._owner_places = places, owner_places
        self._active: dict[str, _Active] = {}
        self._inbox: SimpleQueue[_Heard | _Left | _Look] = SimpleQueue()
        self._lanes = Lanes(_WRITERS)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="adapterhub-conductor", daemon=True)

    def start(self, on_unprepared: Callable[[], None]) -> None:
        """`on_unprepared` is called when a job has gone back to validation."""
        self._on_unprepared = on_unprepared
        self._thread.start()

    def stop(self) -> None:
        """Takes all runs out and saves their states; the engine must still run."""
        self._stopping.set()
        self.wake()
        self._thread.join()
        self._lanes.close()

    def busy(self, jobs: Collection[str]) -> bool:
        """Whether one of those jobs, by their ids, has a place."""
        return not self._active.keys().isdisjoint(jobs)

    def wake(self) -> None:
        self._inbox.put(_Look())

    # -- the conductor's thread

    def _loop(self) -> None:
        self._insist(self._go_on_with_those_that_ran)
        while not self._stopping.is_set():
            batch = self._take()
            self._insist(self._note, batch)
            for item in batch:
                self._insist(self._handle, item)
            if any(not isinstance(item, _Heard) for item in batch):
                self._insist(self._look)
        self._take_all_out()

    def _take(self) -> list[_Heard | _Left | _Look]:
        """All there is in the inbox, at least one."""
        batch = [self._inbox.get()]
        while True:
            try:
                batch.append(self._inbox.get_nowait())
            except Empty:
                return batch

    def _insist(self, action: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Does it, again and again while the database cannot be written to, as on a full disk: what was told is not
        lost, and the runs go on. Gives up when the server stops."""
        while True:
            try:
                return action(*args, **kwargs)
            except Exception:
                log.exception("jobs cannot be moved along; trying again in %d s", _PAUSE_SECONDS)
            if self._stopping.wait(_PAUSE_SECONDS):
                return None

    def _note(self, batch: list[_Heard | _Left | _Look]) -> None:
        """Writes all progress down, in one transaction."""
        told = [(i.active, i.news) for i in batch if isinstance(i, _Heard)]
        self._jobs.note([note_of(active.job, news) for active, news in told if isinstance(news, Progress)])

    def _handle(self, item: _Heard | _Left | _Look) -> None:
        match item:
            case _Heard(active, news):
                if self._active.get(active.job.id) is active:
                    self._hear(active, news)
            case _Left(active, error):
                if error is not None:
                    self._jobs.fail(active.job, error)
                del self._active[active.job.id]

    def _hear(self, active: _Active, news: News) -> None:
        if active.phase is _Phase.ENDED:
            return
        match news:
            case Checkpoint():
                self._write(active, partial(self._publisher.checkpoint, active.job, news))
            case Saved(snapshot):
                active.snapshot = snapshot
                self._write(active, partial(self._save, active))
            case Trained():
                self._write(active, partial(self._publish, active, partial(self._publisher.finish, active.job, news)))
        if _is_last(news):
            active.phase = _Phase.ENDED
            if not isinstance(news, Trained):
                self._leave(active, news if isinstance(news, HubError) else None)

    def _leave(self, active: _Active, error: HubError | None = None) -> None:
        """Frees the place when all is written."""
        self._write(active, lambda: self._inbox.put(_Left(active, error)))

    # -- in lanes

    def _write(self, active: _Active, action: Callable[[], None]) -> None:
        """After what is being written of this job already."""
        self._lanes.add(active.job.id, action)

    def _save(self, active: _Active) -> None:
        """The newest snapshot, unless it is saved already."""
        job, snapshot, active.snapshot = active.job, active.snapshot, None
        if snapshot is None:
            return
        try:
            snapshot.save(self._workspaces.of(job.id).state)
            self._jobs.update(job.id, saved_step=snapshot.step)
        except (HubError, OSError) as error:
            log.warning("the state of job %s after step %d cannot be saved: %s", job.id, snapshot.step, error)
            self._publisher.warn(job, f"The state after step {snapshot.step} could not be saved: {error}")

    def _publish(self, active: _Active, publish: Callable[[], None]) -> None:
        error: HubError | None = None
        try:
            if self._stopping.is_set():  # the next start goes on from the last state
                return
            publish()
        except HubError as failure:
            error = failure
        except Exception as failure:
            log.exception("job %s cannot be published", active.job.id)
            error = unexpected(failure)
        self._inbox.put(_Left(active, error))

    # -- starting and taking out

    def _look(self) -> None:
        """Takes out what should not run any more, and starts what comes next."""
        running = {job.id for job in self._jobs.in_status(Status.RUNNING)}
        for active in list(self._active.values()):
            if active.phase is _Phase.TRAINING and active.job.id not in running:
                self._take_out(active)
        while len(self._active) < self._places:
            job = self._jobs.next_to_run(self._owner_places, self._active.keys())
            if job is None:
                break
            self._begin(job)
        self._lanes.add("clean-up", lambda: self._workspaces.clean_up(self._in_use))

    def _in_use(self) -> set[str]:
        """The jobs whose workspaces are needed."""
        return {*list(self._active), *(job.id for job in self._jobs.under_way())}

    def _take_out(self, active: _Active) -> None:
        """Before its next micro-batch. A job that was cancelled needs no state any more."""
        assert active.run is not None
        if self._jobs.get(None, active.job.id).status.final:
            active.phase = _Phase.ENDED
            self._trainer.take_out(active.run, save=False)
            self._leave(active)
        else:
            active.phase = _Phase.LEAVING
            self._trainer.take_out(active.run, save=True)

    def _go_on_with_those_that_ran(self) -> None:
        """At a start."""
        for job in self._jobs.in_status(Status.RUNNING):
            if job.id not in self._active:
                self._begin(job)

    def _begin(self, job: Job) -> None:
        """Gives a job a place."""
        active = _Active(replace(job, status=Status.RUNNING))
        try:
            started = self._starter.start(job, lambda news: self._inbox.put(_Heard(active, news)))
        except HubError as error:
            self._jobs.fail(job, error)
            return
        except Exception as error:
            log.exception("job %s cannot be started", job.id)
            self._jobs.fail(job, unexpected(error))
            return
        if started is None:
            message = "What was prepared for the job is no longer on the server's disk: its files are validated again"
            self._jobs.move(job, Status.VALIDATING, message, level="warn", report=None)
            self._on_unprepared()
        elif self._jobs.move(job, Status.RUNNING, started.message):
            self._active[job.id] = active
            if started.run is not None:
                active.run = started.run
                self._trainer.add(active.run, _WEIGHTS[job.priority])
            elif started.published is not None:
                active.phase = _Phase.ENDED
                settle = partial(self._publisher.settle, active.job, started.published)
                self._write(active, partial(self._publish, active, settle))

    # -- the end

    def _take_all_out(self) -> None:
        """As the server stops: the jobs stay `running`, with a state from which the next start goes on."""
        waiting = {active for active in self._active.values() if active.phase is not _Phase.ENDED}
        for active in waiting:
            if active.phase is _Phase.TRAINING and active.run is not None:
                self._trainer.take_out(active.run, save=True)
        deadline = time.monotonic() + _STOP_SECONDS
        while waiting:
            try:
                item = self._inbox.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                log.error("the engine does not hand over the states of %d jobs", len(waiting))
                return
            if isinstance(item, _Heard) and item.active in waiting:
                self._insist(self._note, [item])
                if isinstance(item.news, Saved):
                    self._hear(item.active, item.news)
                if _is_last(item.news):
                    waiting.discard(item.active)


def _is_last(news: News) -> bool:
    return isinstance(news, Trained | HubError) or (isinstance(news, Saved) and news.last)
