"""`/v1/fine_tuning/jobs`: from a file to a live model."""

from __future__ import annotations

import hashlib
import random
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import Field

from adapterhub.api.auth import Caller, Principal, Training
from adapterhub.api.body import AtMost, Body, IdempotencyKey
from adapterhub.api.hub import Hub, TheHub
from adapterhub.api.models import find_model
from adapterhub.api.pages import After, listed, page
from adapterhub.errors import BadRequest, NotFound
from adapterhub.swap.names import check_name
from adapterhub.swap.versions import Version
from adapterhub.train.dataset import Kind
from adapterhub.train.events import Event
from adapterhub.train.files import StoredFile
from adapterhub.train.job import Job, Order, Priority
from adapterhub.train.plan import check_hyperparameters

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])
MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


class JobRequest(Body):
    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    hyperparameters: dict[str, Any] | None = None
    method: dict[str, Any] | None = None
    priority: Literal["low", "normal", "high"] = "normal"
    metadata: Annotated[dict[MetadataKey, MetadataValue], AtMost(16)] | None = None
    integrations: list[Any] | None = None


def job_object(job: Job) -> dict[str, Any]:
    """OpenAI's fields, then ours."""
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
        "method": {"type": job.method, job.method: {"hyperparameters": job.hyperparameters}},
        "seed": job.seed,
        "trained_tokens": job.trained_tokens,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "result_files": [job.result_file] if job.result_file else [],
        "integrations": None,
        "metadata": job.metadata,
        "error": job.error,
        "user_provided_suffix": job.given_suffix,
        "priority": job.priority.name.lower(),
        "initial_model": job.initial,
        "report": job.report,
        "estimate": job.estimate,
        "proof": job.proof,
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


def checkpoint_object(version: Version) -> dict[str, Any]:
    return {
        "id": f"ftckpt-{version.id}",
        "object": "fine_tuning.job.checkpoint",
        "created_at": version.created_at,
        "fine_tuning_job_id": version.origin,
        "fine_tuned_model_checkpoint": version.model,
        "step_number": version.step,
        "metrics": version.metrics or {},
    }


@router.post("")
async def create(
    hub: TheHub, caller: Training, body: JobRequest, request: Request, idempotency_key: IdempotencyKey = None
) -> dict[str, Any]:
    retried = request.headers.get("x-stainless-retry-count", "0") != "0"  # an SDK says so of its own retries

    def act() -> dict[str, Any]:
        return _create(hub, caller, _check(hub, caller, body, idempotency_key), retried)

    # an adapter to go on from is looked at, and may have to come from the store
    return await (run_in_threadpool(act) if body.model == hub.base.name else hub.in_store(act))


@router.get("")
def list_jobs(
    hub: TheHub, caller: Caller, request: Request, after: After = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> dict[str, Any]:
    wanted = {n[9:-1]: v for n, v in request.query_params.items() if n.startswith("metadata[") and n.endswith("]")}
    none = request.query_params.get("metadata") == "null"
    jobs, more = hub.jobs.page(caller.owner, after, limit, metadata=None if none else wanted)
    return listed([job_object(j) for j in jobs], more)


@router.get("/{job_id}")
def retrieve(hub: TheHub, caller: Caller, job_id: str) -> dict[str, Any]:
    return job_object(hub.jobs.get(caller.owner, job_id))


@router.post("/{job_id}/cancel")
def cancel(hub: TheHub, caller: Training, job_id: str) -> dict[str, Any]:
    return _changed(hub, hub.jobs.cancel(caller.owner, job_id))


@router.post("/{job_id}/pause")
def pause(hub: TheHub, caller: Training, job_id: str) -> dict[str, Any]:
    return _changed(hub, hub.jobs.pause(caller.owner, job_id))


@router.post("/{job_id}/resume")
def resume(hub: TheHub, caller: Training, job_id: str) -> dict[str, Any]:
    return _changed(hub, hub.jobs.resume(caller.owner, job_id))


@router.get("/{job_id}/events")
def events(
    hub: TheHub, caller: Caller, job_id: str, after: After = None, limit: Annotated[int, Query(ge=1, le=1000)] = 20
) -> dict[str, Any]:
    job = hub.jobs.get(caller.owner, job_id)
    found, more = hub.jobs.events.page(job.id, after, limit)
    return listed([event_object(e) for e in found], more)


@router.get("/{job_id}/checkpoints")
def checkpoints(
    hub: TheHub, caller: Caller, job_id: str, after: After = None, limit: Annotated[int, Query(ge=1, le=1000)] = 10
) -> dict[str, Any]:
    """Those that are kept, the last step first."""
    job = hub.jobs.get(caller.owner, job_id)
    return page([checkpoint_object(v) for v in hub.registry.checkpoints(caller.owner, job.id)], after, limit)


def _changed(hub: Hub, job: Job) -> dict[str, Any]:
    hub.worker.wake()
    return job_object(job)


def _create(hub: Hub, caller: Principal, order: Order, retried: bool) -> dict[str, Any]:
    with hub.database.transaction():
        job, new = hub.jobs.create(order, retry=retried, check=hub.room.check_job)
        if new:
            hub.usage.follow_job(job.id, caller.owner, caller.key)
    if new:
        hub.worker.wake()
    return job_object(job)


def _check(hub: Hub, caller: Principal, body: JobRequest, key: str | None) -> Order:
    """Everything that can be said at once; what is in the files is looked at afterwards."""
    if body.integrations:
        raise BadRequest("integrations are not supported. Leave them out.", param="integrations")
    initial = _model(hub, caller, body.model)
    training = _file(hub, caller.owner, body.training_file, "training_file")
    validation = _file(hub, caller.owner, body.validation_file, "validation_file") if body.validation_file else None
    kind, of_method = _method(body.method)
    hyperparameters = {**of_method, **(body.hyperparameters or {})}
    meta = hub.registry.block(initial).meta if initial else None
    check_hyperparameters(hyperparameters, hub.base.layout, kind, meta)
    if validation is not None and hyperparameters.get("held_out") not in (None, "auto", 0):
        raise BadRequest(
            "There is a validation file, so nothing is held out of the training file. Leave hyperparameters.held_out "
            "or validation_file out.",
            param="hyperparameters.held_out",
        )
    return Order(
        owner=caller.owner,
        model=body.model,
        training_file=training.id,
        validation_file=validation.id if validation else None,
        input_bytes=training.bytes + (validation.bytes if validation else 0),
        suffix=check_name(body.suffix, "suffix") if body.suffix else None,
        seed=random.randrange(2**31) if body.seed is None else body.seed,
        method=kind,
        hyperparameters=hyperparameters,
        priority=Priority[body.priority.upper()],
        initial=initial.model if initial else None,
        metadata=body.metadata,
        fingerprint=hub.base.fingerprint,
        digest=hashlib.sha256(body.model_dump_json().encode()).hexdigest(),
        key=key,
    )


def _model(hub: Hub, caller: Principal, name: str) -> Version | None:
    """The version that the training goes on from; None for the base. Raises NotFound and WrongBase."""
    try:
        return find_model(hub, caller, name).version
    except NotFound as error:
        message = f"{error.message} To train from the base, name it: {hub.base.name!r}."
        raise NotFound(message, param="model", code=error.code) from error


def _file(hub: Hub, owner: str, identity: str, param: str) -> StoredFile:
    try:
        file = hub.files.get(owner, identity)
    except NotFound as error:
        raise NotFound(error.message, param=param) from error
    if file.purpose != "fine-tune":
        raise BadRequest(
            f"File {file.id} was uploaded with purpose {file.purpose!r}; a {param.replace('_', ' ')} needs "
            "'fine-tune'.",
            param=param,
        )
    return file


def _method(method: dict[str, Any] | None) -> tuple[Kind, dict[str, Any]]:
    """What a job's `method` asks for, and its hyperparameters."""
    if method is None:
        return Kind.SUPERVISED, {}
    name = method.get("type")
    if name not in list(Kind):
        known = " and ".join(repr(str(kind)) for kind in Kind)
        raise BadRequest(f"method.type is {str(name)[:80]!r}; {known} are supported.", param="method.type")
    _check_known(method, ("type", name), "method")
    inner = method.get(name)
    if not isinstance(inner, dict | None):
        raise BadRequest(f"method.{name} must be an object.", param=f"method.{name}")
    _check_known(inner or {}, ("hyperparameters",), f"method.{name}")
    found = (inner or {}).get("hyperparameters")
    if not isinstance(found, dict | None):
        where = f"method.{name}.hyperparameters"
        raise BadRequest(f"{where} must be an object.", param=where)
    return Kind(name), found or {}


def _check_known(given: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    """Raises BadRequest for what a job would be trained without."""
    for field, value in given.items():
        if field not in known and value is not None:
            param = f"{where}.{field[:80]}"
            raise BadRequest(
                f"{param} is given, but {where} has {' and '.join(known)} alone. Leave it out.", param=param
            )
