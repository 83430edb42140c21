"""`/v1/fine_tuning/jobs`: from a file to a live model."""

from __future__ import annotations

import hashlib
import random
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import Field

from adapterhub.api.auth import Caller, Training
from adapterhub.api.body import Body
from adapterhub.api.hub import Hub, TheHub
from adapterhub.api.pages import After, page
from adapterhub.errors import BadRequest, NotFound
from adapterhub.swap.names import check_name
from adapterhub.train.jobs import Event, Job, Order
from adapterhub.train.plan import check_hyperparameters

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])


class JobRequest(Body):
    model: str
    training_file: str
    suffix: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    hyperparameters: dict[str, Any] | None = None
    method: dict[str, Any] | None = None
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = None
    validation_file: str | None = None
    integrations: list[Any] | None = None


def job_object(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created_at,
        "finished_at": job.finished_at,
        "estimated_finish": job.estimated_finish,
        "model": job.model,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": job.owner,
        "status": job.status,
        "hyperparameters": job.hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": job.hyperparameters}},
        "seed": job.seed,
        "trained_tokens": job.trained_tokens,
        "training_file": job.training_file,
        "validation_file": None,
        "result_files": [],
        "integrations": None,
        "metadata": job.metadata,
        "error": job.error,
        "user_provided_suffix": job.given_suffix,
    }


def event_object(event: Event) -> dict[str, Any]:
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": event.created_at,
        "level": event.level,
        "message": event.message,
        "type": event.type,
        "data": event.data,
    }


@router.post("")
def create(hub: TheHub, caller: Training, body: JobRequest, request: Request) -> dict[str, Any]:
    order = _check(hub, caller.owner, body, request.headers.get("idempotency-key"))
    retried = request.headers.get("x-stainless-retry-count", "0") != "0"  # an SDK says so of its own retries
    job, new = hub.jobs.create(order, retry=retried)
    if new:
        hub.usage.follow_job(job.id, caller.owner, caller.key)
        hub.worker.wake()
    return job_object(job)


@router.get("")
def list_jobs(
    hub: TheHub, caller: Caller, request: Request, after: After = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> dict[str, Any]:
    jobs = hub.jobs.list(caller.owner)
    for name, value in request.query_params.items():
        if name.startswith("metadata[") and name.endswith("]"):
            jobs = [j for j in jobs if (j.metadata or {}).get(name[9:-1]) == value]
    return page([job_object(j) for j in jobs], after, limit)


@router.get("/{job_id}")
def retrieve(hub: TheHub, caller: Caller, job_id: str) -> dict[str, Any]:
    return job_object(hub.jobs.get(caller.owner, job_id))


@router.post("/{job_id}/cancel")
def cancel(hub: TheHub, caller: Training, job_id: str) -> dict[str, Any]:
    job = hub.jobs.cancel(caller.owner, job_id)
    hub.worker.wake()
    return job_object(job)


@router.get("/{job_id}/events")
def events(
    hub: TheHub, caller: Caller, job_id: str, after: After = None, limit: Annotated[int, Query(ge=1, le=1000)] = 20
) -> dict[str, Any]:
    job = hub.jobs.get(caller.owner, job_id)
    return page([event_object(e) for e in hub.jobs.events(job.id)], after, limit)


def _check(hub: Hub, owner: str, body: JobRequest, key: str | None) -> Order:
    """Everything that can be said at once; what is in the file is looked at afterwards."""
    if body.validation_file is not None:
        raise BadRequest("validation_file is not supported yet. Leave it out.", param="validation_file")
    if body.integrations:
        raise BadRequest("integrations are not supported. Leave them out.", param="integrations")
    if len(body.metadata or {}) > 16:
        raise BadRequest("metadata can have up to 16 pairs.", param="metadata")
    if body.model != hub.base.name:
        if hub.registry.resolve(owner, body.model) is not None:
            raise BadRequest("Going on from a fine-tuned model is not supported yet; name the base.", param="model")
        raise NotFound(
            f"The model {body.model[:200]!r} does not exist or cannot be fine-tuned. This server's base is "
            f"{hub.base.name!r}.",
            param="model",
            code="model_not_found",
        )
    try:
        file = hub.files.get(owner, body.training_file)
    except NotFound as error:
        raise NotFound(error.message, param="training_file") from error
    if file.purpose != "fine-tune":
        raise BadRequest(
            f"File {file.id} was uploaded with purpose {file.purpose!r}; a training file needs 'fine-tune'.",
            param="training_file",
        )
    hyperparameters = {**_of_method(body.method), **(body.hyperparameters or {})}
    check_hyperparameters(hyperparameters, hub.base.layout)
    return Order(
        owner=owner,
        model=body.model,
        training_file=file.id,
        suffix=check_name(body.suffix, "suffix") if body.suffix else None,
        seed=random.randrange(2**31) if body.seed is None else body.seed,
        hyperparameters=hyperparameters,
        metadata=body.metadata,
        fingerprint=hub.base.fingerprint,
        digest=hashlib.sha256(body.model_dump_json().encode()).hexdigest(),
        key=key,
    )


def _of_method(method: dict[str, Any] | None) -> dict[str, Any]:
    if method is None:
        return {}
    if method.get("type") != "supervised":
        raise BadRequest(f"method.type is {method.get('type')!r}; only 'supervised' is supported.", param="method.type")
    inner = method.get("supervised")
    found = inner.get("hyperparameters") if isinstance(inner, dict) else inner
    if not isinstance(found, dict | None):
        raise BadRequest("method.supervised and its hyperparameters must be objects.", param="method.supervised")
    return found or {}
