"""Runs the jobs that are queued, as many at once as there are places, and writes down what they tell.

One thread hears the news of all runs, and starts and takes out runs. It never waits for a block or a state to be
written: that is what lanes are for. A job's status in the database is what counts: a run whose job is no longer
`running` is taken out; one that was `running` when the server ended goes on at the next start from the state it was
saved in last.

There is a trainer for each device. A job trains on one of them, that with the fewest jobs when it starts; when the
device is lost, the job goes on on another from the state it was saved in last.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import partial
from queue import Empty, SimpleQueue
from typing import ParamSpec

from adapterhub.base.lost import out_of_memory, told_briefly
from adapterhub.errors import HubError, ServerFault
from adapterhub.swap.memory import give_back_freed
from adapterhub.train.cotrainer import CoTrainer
from adapterhub.train.job import Job, Priority, Status
from adapterhub.train.jobs import JobStore
from adapterhub.train.lanes import Lanes
from adapterhub.train.news import Checkpoint, Lost, News, Progress, Saved, Snapshot, TakenOut, Trained
from adapterhub.train.progress import note_of
from adapterhub.train.publish import Publisher
from adapterhub.train.run import Run
from adapterhub.train.starter import Starter, Unprepared
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
    DROPPED = auto()  # the run was asked to end, and nothing that it tells counts but that it has
    ENDED = auto()  # the run tells nothing more that counts; what came of it may still be written


@dataclass(eq=False)
class _Active:
    """A job that has a place."""

    job: Job  # as it was when it was started
    trainer: CoTrainer
    run: Run | None = None  # None: it had been trained before
    phase: _Phase = _Phase.TRAINING
    snapshot: Snapshot | None = None  # the newest that is not saved yet


@dataclass(frozen=True)
class _Heard:
    active: _Active
    news: News


@dataclass(frozen=True)
class _Left:
    """The place is free; `error`: why the job fails; `lost`: its device is, and it has to go on elsewhere."""

    active: _Active
    error: HubError | None = None
    lost: bool = False


@dataclass(frozen=True)
class _Look:
    """Something is new in the database."""


class Conductor:
    """`wake` it after a job was queued, or was taken from `queued` or `running` by somebody else."""

    def __init__(
        self,
        trainers: Sequence[CoTrainer],
        jobs: JobStore,
        workspaces: Workspaces,
        starter: Starter,
        publisher: Publisher,
        *,
        places: int,
        owner_places: int,
    ) -> None:
        """`trainers`: one for each device; `places`: jobs that run at once; `owner_places`: of them those of one
        owner."""
        self._trainers, self._jobs, self._workspaces = trainers, jobs, workspaces
        self._starter, self._publisher = starter, publisher
        self._places, self._owner_places = places, owner_places
        self._active: dict[str, _Active] = {}
        self._inbox: SimpleQueue[_Heard | _Left | _Look] = SimpleQueue()
        self._lanes = Lanes(_WRITERS)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="adapterhub-conductor", daemon=True)

    def start(self, on_unprepared: Callable[[], None], validating: Callable[[], Collection[str]]) -> None:
        """`on_unprepared` is called when a job has gone back to validation. `validating` says which jobs, by their ids,
        are there now: one that was cancelled may still write."""
        self._on_unprepared, self._validating = on_unprepared, validating
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
        self.wake()  # for those that were queued when the last server ended
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
            case _Left(active, error, lost):
                if error is not None:
                    self._jobs.fail(active.job, self._publisher.with_checkpoint(active.job, error))
                self._active.pop(active.job.id, None)  # where this is tried again, it may be gone already
                active.run = None  # its memory is for who comes next
                give_back_freed()
                if lost and self._jobs.get(None, active.job.id).status is Status.RUNNING:
                    self._begin_elsewhere(active.job)

    def _hear(self, active: _Active, news: News) -> None:
        if active.phase is _Phase.ENDED:
            return
        if active.phase is _Phase.DROPPED:
            if _is_last(news):
                active.phase = _Phase.ENDED
                self._leave(active)
            return
        match news:
            case Checkpoint():
                self._write(active, partial(self._publisher.checkpoint, active.job, news))
            case Saved(snapshot):
                active.snapshot = snapshot
                self._write(active, partial(self._save, active))
            case Trained():
                self._write(active, partial(self._publish, active, partial(self._publisher.finish, active.job, news)))
        if isinstance(news, Lost):
            again, active.phase = active.phase is _Phase.TRAINING, _Phase.ENDED
            self._write(active, lambda: self._inbox.put(_Left(active, lost=again)))
        elif _is_last(news):
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
        while len(self._active) < self._places and (trainer := self._idlest()) is not None:
            job = self._jobs.next_to_run(self._owner_places, self._active.keys())
            if job is None or not self._begin(job, trainer):
                break
        self._lanes.add("clean-up", lambda: self._workspaces.clean_up(self._in_use))

    def _in_use(self) -> set[str]:
        """The jobs whose workspaces are needed."""
        return {*list(self._active), *self._validating(), *(job.id for job in self._jobs.under_way())}

    def _take_out(self, active: _Active) -> None:
        """Before its next micro-batch. A job that was cancelled needs no state any more."""
        assert active.run is not None
        if self._jobs.get(None, active.job.id).status.final:
            active.phase = _Phase.DROPPED
            active.trainer.take_out(active.run, save=False)
        else:
            active.phase = _Phase.LEAVING
            active.trainer.take_out(active.run, save=True)

    def _go_on_with_those_that_ran(self) -> None:
        """At a start."""
        for job in self._jobs.in_status(Status.RUNNING):
            trainer = self._idlest()
            if job.id not in self._active and trainer is not None:
                self._begin(job, trainer)

    def _begin_elsewhere(self, job: Job) -> None:
        trainer = self._idlest()
        if trainer is not None:
            self._begin(job, trainer, "The device that trained it is lost")
        else:
            message = "All devices are lost: the job goes on when the server is started again"
            self._jobs.events.add(job.id, message, level="warn")

    def _idlest(self) -> CoTrainer | None:
        """The trainer with the fewest jobs; None when all devices are lost."""
        count = Counter(active.trainer for active in self._active.values())
        return min((t for t in self._trainers if not t.lost), key=lambda t: count[t], default=None)

    def _begin(self, job: Job, trainer: CoTrainer, why: str = "The server restarted") -> bool:
        """Gives a job a place; `why`: if it had one before. False when its device has no memory for one more: the job
        waits until others have left."""
        active = _Active(replace(job, status=Status.RUNNING), trainer)
        try:
            started = self._starter.start(job, trainer.base, lambda news: self._inbox.put(_Heard(active, news)), why)
        except HubError as error:
            self._jobs.fail(job, error)
            return True
        except Exception as error:
            if out_of_memory(error):
                return self._put_off(job, trainer, error)
            log.exception("job %s cannot be started", job.id)
            self._jobs.fail(job, unexpected(error))
            return True
        if isinstance(started, Unprepared):
            level, changes = ("warn", {"report": None}) if started.files else ("info", {})
            self._jobs.move(job, Status.VALIDATING, started.message, level=level, **changes)
            self._on_unprepared()
        elif self._jobs.move(job, Status.RUNNING, started.message):
            self._active[job.id] = active
            if started.run is not None:
                active.run = started.run
                trainer.add(active.run, _WEIGHTS[job.priority])
            elif started.published is not None:
                active.phase = _Phase.ENDED
                settle = partial(self._publisher.settle, active.job, started.published)
                self._write(active, partial(self._publish, active, settle))
        return True

    def _put_off(self, job: Job, trainer: CoTrainer, error: Exception) -> bool:
        """There is no memory for its parameters. False where others hold some of it, for which it can wait."""
        if all(active.trainer is not trainer for active in self._active.values()):
            message = f"There is no memory for the job's parameters; choose a lower rank. ({told_briefly(error)})"
            self._jobs.fail(job, ServerFault(message, code="out_of_memory"))
            return True
        if job.status is Status.RUNNING:
            message = "The device has no memory for the job's parameters until another has ended"
            self._jobs.move(job, Status.QUEUED, message, level="warn")
        return False

    # -- the end

    def _take_all_out(self) -> None:
        """As the server stops: the jobs stay `running`, with a state from which the next start goes on."""
        waiting = {active for active in self._active.values() if active.phase is not _Phase.ENDED}
        for active in waiting:
            if active.phase is _Phase.TRAINING and active.run is not None:
                active.trainer.take_out(active.run, save=True)
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
    return isinstance(news, Trained | TakenOut | Lost | HubError) or (isinstance(news, Saved) and news.last)
