"""From what a run has learned to versions that are served: checkpoints on the way, and at the end a release, if it is
proven to be better than the base, or else a candidate.

The block is published as a candidate first, which no name points at. One transaction then makes it the release, adds
the result file and ends the job, so that a job that was cancelled or paused until that very moment has changed no name,
and a kill leaves all of it or nothing. The methods are called one after the other for each job, on a thread that may
wait for a slow disk or store.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any

from adapterhub.errors import HubError, QuotaExceeded, ServerFault, StorageFull
from adapterhub.swap.database import Database
from adapterhub.swap.ref import AdapterRef
from adapterhub.swap.registry import Registry
from adapterhub.swap.versions import Kind, Version
from adapterhub.train.files import RESULTS, FileStore, StoredFile
from adapterhub.train.job import Job, Status
from adapterhub.train.jobs import JobStore
from adapterhub.train.news import Checkpoint, Proof, Trained
from adapterhub.train.quota import Room
from adapterhub.train.results import FILENAME, result_csv

log = logging.getLogger(__name__)


class Publisher:
    """`base` is the name the base is served under."""

    def __init__(
        self,
        database: Database,
        registry: Registry,
        files: FileStore,
        jobs: JobStore,
        base: str,
        *,
        hint: Callable[[AdapterRef], None],
        forget: Callable[[Iterable[Version]], None],
        room: Room,
    ) -> None:
        """`hint` says that a version is likely to be asked for; `forget` takes versions that were deleted out of
        memory."""
        self._database, self._registry = database, registry
        self._files, self._jobs = files, jobs
        self._base, self._hint, self._forget, self._room = base, hint, forget, room

    def checkpoint(self, job: Job, taken: Checkpoint) -> None:
        """Keeps a checkpoint, and lets go of those that the job keeps no longer. Where there is no room, on the disk or
        in the owner's quota, or no store, the job goes on without it, and its events say so."""
        keep = job.hyperparameters["keep_checkpoints"]
        if keep == 0:
            return
        try:
            with self._room.taken(job.owner, taken.block.meta.nbytes):
                version = self._registry.publish(
                    job.owner,
                    job.suffix,
                    taken.block,
                    self._base,
                    job.id,
                    kind=Kind.CHECKPOINT,
                    step=taken.step,
                    metrics=taken.metrics,
                )
            with self._database.transaction():
                ended = self._jobs.get(None, job.id).status.final
                if not ended:
                    message = f"Checkpoint created at step {taken.step} with Snapshot ID: {version.model}"
                    self._jobs.events.add(job.id, message)
            if ended:  # cancelled just now
                self._forget([self._registry.delete_version(job.owner, version.id)])
            else:
                self._forget(self._registry.prune_checkpoints(job.owner, job.id, keep))
        except HubError as error:
            self.warn(job, f"The checkpoint of step {taken.step} could not be kept: {error.message}")

    def finish(self, job: Job, trained: Trained) -> None:
        """Publishes what was trained, and ends the job. Raises ServerFault for what nobody should be served with, and
        StorageFull or Unavailable when it cannot be written, and QuotaExceeded, as the quota may have become smaller
        since the job was let in."""
        proof = trained.proof
        if not proof.finite:
            raise ServerFault(
                "The trained adapter's numbers are not finite: the training diverged. Lower learning_rate_multiplier "
                f"(it was {job.hyperparameters['learning_rate_multiplier']:g}).",
                code="training_diverged",
            )
        if not proof.has_effect:
            raise ServerFault(
                "The trained adapter changes nothing: no step has moved it. Raise learning_rate_multiplier, or train "
                "for more steps.",
                code="no_effect",
            )
        if trained.stopped_early:
            message = (
                f"Stopped early: the loss on held-out data was lowest after step {trained.step}, which is published"
            )
            self._jobs.events.add(job.id, message)
        told = _proof_object(proof)
        self._jobs.update(job.id, proof=json.dumps(told), trained_tokens=trained.trained_tokens)
        try:
            with self._room.taken(job.owner, trained.block.meta.nbytes, job=job.id):
                version = self._registry.publish(
                    job.owner, job.suffix, trained.block, self._base, job.id, kind=Kind.CANDIDATE, metrics=told
                )
        except QuotaExceeded as error:
            raise QuotaExceeded(f"What was trained is not published. {error.message}") from error
        self._conclude(replace(job, proof=told), version)

    def settle(self, job: Job, version: Version) -> None:
        """Ends a job that has published already, but was killed or paused before it was said so."""
        self._conclude(job, version)

    def with_checkpoint(self, job: Job, error: HubError) -> HubError:
        """Why the job fails, and which checkpoint it leaves, if any."""
        checkpoints = self._registry.checkpoints(job.owner, job.id)
        if not checkpoints:
            return error
        left = f"The last checkpoint, {checkpoints[0].model}, can be used and trained further."
        return HubError(f"{error.message} {left}", param=error.param, code=error.code)

    def warn(self, job: Job, message: str) -> None:
        """An event, or a line in the log when there is no room for one."""
        try:
            self._jobs.events.add(job.id, message, level="warn")
        except HubError:
            log.warning("job %s: %s", job.id, message)

    def _conclude(self, job: Job, version: Version) -> None:
        assert job.proof is not None
        if job.proof["passed"]:  # it is read while the job is being ended
            self._hint(version.ref)
        file = self._write_curve(job)
        try:
            with self._database.transaction():
                status = self._jobs.get(None, job.id).status
                if status is Status.RUNNING:
                    self._succeed(job, version, file)
                    return
        except BaseException:
            self._discard(file)
            raise
        self._discard(file)
        if status is Status.CANCELLED:
            self._forget([self._registry.delete_version(job.owner, version.id)])

    def _write_curve(self, job: Job) -> StoredFile | None:
        """The result file. None where there is no room for it, and an event says so: the model is worth more, and the
        events have the curve as well."""
        try:
            return self._files.write(job.owner, FILENAME, RESULTS, [result_csv(self._jobs.events.metrics(job.id))])
        except StorageFull as error:
            self.warn(job, f"The result file could not be written: {error.message}")
            return None

    def _discard(self, file: StoredFile | None) -> None:
        if file is not None:
            self._files.discard(file)

    def _succeed(self, job: Job, version: Version, file: StoredFile | None) -> None:
        """Within a transaction."""
        assert job.proof is not None
        figures = _figures(job)
        if file is not None:
            self._files.add(file)
        if job.proof["passed"]:
            self._registry.promote(job.owner, version.adapter, version.id)
            self._jobs.events.add(job.id, f"Checked before publishing: {figures}")
        else:
            self._jobs.events.add(
                job.id,
                f"Published as a candidate only, as it is {_shortcoming(job)}: {figures}. {version.alias} is what it "
                f"was; have it point at the candidate with `adapterhub adapters promote {version.alias} "
                f"{version.number}`",
                level="warn",
            )
        self._jobs.move(
            job,
            Status.SUCCEEDED,
            f"New fine-tuned model created: {version.model}",
            fine_tuned_model=version.model,
            result_file=file and file.id,
        )
        self._jobs.events.add(job.id, "The job has successfully completed")


def _proof_object(proof: Proof) -> dict[str, Any]:
    """As the job object and the version show it."""
    return {**asdict(proof), "passed": proof.usable and proof.beats_base and proof.no_worse}


def _figures(job: Job) -> str:
    """Of a job's proof."""
    proof = job.proof
    assert proof is not None
    where = "held-out data" if proof["held_out"] else "examples it was trained on"
    told = f"a loss of {proof['trained']['loss']:.3f} on {where}, the base's is {proof['base']['loss']:.3f}"
    return told + (f", that of {job.initial} {initial['loss']:.3f}" if (initial := proof.get("initial")) else "")


def _shortcoming(job: Job) -> str:
    """Of a job whose proof has not passed."""
    proof = job.proof
    assert proof is not None
    better = proof["trained"]["loss"] < proof["base"]["loss"]
    return "worse than what it went on from" if better else "no better than the base"
