"""Moves jobs along: one thread validates files as they come, one trains and publishes, one job at a time.

After a restart every job goes on from what the database says: one that ran starts over, unless it had published.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

from adapterhub.base.engine import Engine
from adapterhub.base.text import TextCodec
from adapterhub.errors import HubError, InvalidTrainingFile, NotFound, ServerFault, WrongBase
from adapterhub.swap.database import now
from adapterhub.swap.registry import Registry, Version
from adapterhub.train.data import DataSet, read_data_set
from adapterhub.train.files import FileStore
from adapterhub.train.jobs import Job, JobStore, Status
from adapterhub.train.plan import Plan, make_plan
from adapterhub.train.trainer import News, Progress, Trained, Trainer

log = logging.getLogger(__name__)
_PAUSE_SECONDS = 2


class _Interrupted(Exception):
    """The job was cancelled, or the server stops: what is done for the job has no more use now."""


class Worker:
    """`wake` it after a job was created or cancelled."""

    def __init__(
        self, engine: Engine, codec: TextCodec, files: FileStore, jobs: JobStore, registry: Registry, micro_tokens: int
    ) -> None:
        self._engine, self._codec = engine, codec
        self._files, self._jobs, self._registry = files, jobs, registry
        self._micro_tokens = micro_tokens
        self._changed = threading.Condition()
        self._stopping = False
        self._trainer: tuple[str, Trainer, SimpleQueue[News | None]] | None = None
        self._threads = [
            threading.Thread(target=self._loop, args=(status, act), name=f"adapterhub-{status}", daemon=True)
            for status, act in ((Status.VALIDATING, self._validate), (Status.QUEUED, self._train))
        ]
        engine.set_idle_work(self)

    def start(self) -> None:
        for job in self._jobs.list(None):
            if job.status is Status.RUNNING:
                self._recover(job)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
        self.wake()
        for thread in self._threads:
            thread.join()

    def wake(self) -> None:
        """Looks at the database again: something in it is new."""
        with self._changed:
            self._changed.notify_all()
            if self._trainer is not None:
                job, trainer, news = self._trainer
                if self._stopping or self._ended(job):
                    trainer.cancel()
                    news.put(None)

    @property
    def running(self) -> int:
        return int(self._trainer is not None)

    def step(self, tokens: int, give_way: Callable[[], None]) -> int:
        """A piece of the job that trains now, on the engine's thread."""
        running = self._trainer
        return 0 if running is None else running[1].step(tokens)

    def _loop(self, status: Status, act: Callable[[Job], None]) -> None:
        while True:
            with self._changed:
                while not self._stopping and self._jobs.next(status) is None:
                    self._changed.wait()
                if self._stopping:
                    return
            try:
                if (job := self._jobs.next(status)) is not None:
                    self._attempt(job, act)
            except Exception:  # not even the failure can be written down, as on a full disk
                log.exception("the jobs cannot be moved along; trying again in %d s", _PAUSE_SECONDS)
                with self._changed:
                    self._changed.wait_for(lambda: self._stopping, _PAUSE_SECONDS)

    def _attempt(self, job: Job, act: Callable[[Job], None]) -> None:
        try:
            act(job)
        except _Interrupted:
            pass
        except HubError as error:
            self._jobs.fail(job, error)
        except Exception as error:
            log.exception("job %s failed", job.id)
            self._jobs.fail(job, ServerFault(f"The server met an unexpected error: {error}"))

    def _recover(self, job: Job) -> None:
        published = self._registry.of_origin(job.owner, job.id)
        if published is not None:  # killed between publishing and saying so
            self._succeed(job, published)
        else:
            message = "The server restarted while the job ran; it starts again from the first step"
            self._jobs.move(job, Status.QUEUED, message, level="warn", estimated_finish=None)

    def _validate(self, job: Job) -> None:
        data = self._read(job)
        plan = make_plan(job.hyperparameters, job.seed, len(data.examples), self._engine.base.layout)
        if data.cut:
            message = f"{data.cut} example(s) were longer than {self._engine.context} tokens and were cut"
            dropped = f"; {data.dropped} of them had nothing left to learn and were dropped" if data.dropped else ""
            self._jobs.event(job.id, message + dropped, level="warn")
        self._jobs.event(
            job.id,
            f"{len(data.examples)} examples, {data.tokens} tokens; {plan.steps(len(data.examples))} steps in "
            f"{plan.n_epochs} epoch(s) with batch size {plan.batch_size}",
        )
        self._jobs.move(
            job,
            Status.QUEUED,
            "Files validated, moving job to queued state",
            hyperparameters=json.dumps(plan.hyperparameters),
        )
        self.wake()

    def _train(self, job: Job) -> None:
        data = self._read(job)
        plan = make_plan(job.hyperparameters, job.seed, len(data.examples), self._engine.base.layout)
        if not self._jobs.move(job, Status.RUNNING, "Fine-tuning job started"):
            return
        trained = self._follow(job, data, plan)
        if trained is None:
            return
        version = self._registry.publish(job.owner, job.suffix, trained.block, self._engine.base.name, job.id)
        self._succeed(job, version)

    def _follow(self, job: Job, data: DataSet, plan: Plan) -> Trained | None:
        """Runs the training and writes its progress down; None when it was cancelled, or the server stops."""
        news: SimpleQueue[News | None] = SimpleQueue()
        trainer = Trainer(self._engine.base, data.examples, plan, self._micro_tokens, news.put)
        with self._changed:
            self._trainer = (job.id, trainer, news)
        self.wake()  # in case the job was cancelled, or the server stopped, just before
        try:
            self._engine.wake()
            while True:
                heard = news.get()
                if isinstance(heard, HubError):
                    raise heard
                if not isinstance(heard, Progress):
                    return heard if heard is None or not self._ended(job.id) else None
                self._note(job, heard)
        finally:
            trainer.cancel()  # it goes on by itself when its progress could not be written down
            with self._changed:
                self._trainer = None

    def _note(self, job: Job, progress: Progress) -> None:
        data = {
            "step": progress.step,
            "total_steps": progress.total_steps,
            "train_loss": round(progress.loss, 5),
            "train_mean_token_accuracy": round(progress.accuracy, 5),
            "trained_tokens": progress.trained_tokens,
            "tokens_per_second": round(progress.tokens_per_second, 1),
            "seconds_left": round(progress.seconds_left, 1),
        }
        message = f"Step {progress.step}/{progress.total_steps}: training loss={progress.loss:.2f}"
        finish = now() + round(progress.seconds_left)
        self._jobs.note(job, message, data, trained_tokens=progress.trained_tokens, estimated_finish=finish)

    def _succeed(self, job: Job, version: Version) -> None:
        message = f"New fine-tuned model created: {version.model}"
        done = self._jobs.move(job, Status.SUCCEEDED, message, fine_tuned_model=version.model)
        if done:
            self._jobs.event(job.id, "The job has successfully completed")
        else:  # cancelled at the last moment
            self._registry.delete_version(job.owner, version.id)

    def _read(self, job: Job) -> DataSet:
        if job.fingerprint != self._engine.base.fingerprint:
            raise WrongBase(
                f"The job was made for base {job.model} {job.fingerprint[:12]}; the server now runs "
                f"{self._engine.base.name} {self._engine.base.fingerprint[:12]}. Create the job again.",
                param="model",
            )
        try:
            self._files.get(job.owner, job.training_file)
            path = self._files.path(job.training_file)
            return read_data_set(path, self._codec, self._engine.context, lambda: self._go_on(job))
        except (NotFound, FileNotFoundError) as error:
            message = f"The training file {job.training_file} was deleted before the job could read it."
            raise InvalidTrainingFile(message, param="training_file") from error

    def _go_on(self, job: Job) -> None:
        if self._stopping or self._ended(job.id):
            raise _Interrupted

    def _ended(self, job: str) -> bool:
        return self._jobs.get(None, job).status.final
