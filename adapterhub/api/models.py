"""`/v1/models`, and what a model's name means to a caller: the base, a version, or whichever one a name points at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter

from adapterhub.api.auth import Choosing, Principal, Training
from adapterhub.api.hub import Hub, TheHub
from adapterhub.errors import BadRequest, NotFound, WrongBase
from adapterhub.swap.versions import Version, no_release

router = APIRouter(prefix="/v1/models", tags=["models"])


@dataclass(frozen=True)
class Model:
    """A model that a caller may use; `version` None is the base itself."""

    name: str
    version: Version | None
    system_fingerprint: str


def choose_model(hub: Hub, caller: Principal, name: str, user: str | None) -> Model:
    """What answers a request: `find_model`, where a name's requests are split one drawn by the shares, for one `user`
    always the same."""
    model = find_model(hub, caller, name)
    if model.version is None or not model.version.split or name != model.version.alias:
        return model
    return _model(hub, name, hub.registry.choose(model.version, user))


def find_model(hub: Hub, caller: Principal, name: str) -> Model:
    """The base, a version by its own name or by `owner/name@which`, or the current version by `owner/name`.

    Raises NotFound, the same for another owner's model as for none; WrongBase for one made for another base.
    """
    if name == hub.base.name:
        return Model(name, None, _mark(hub))
    version = hub.registry.resolve(caller.owner, name)
    if version is None:
        raise _unknown(hub, caller, name)
    return _model(hub, name, version)


def _model(hub: Hub, name: str, version: Version) -> Model:
    if version.fingerprint != hub.base.fingerprint:
        raise WrongBase(
            f"The model {name!r} was made for base {version.base} {version.fingerprint[:12]}; this server runs "
            f"{hub.base.name} {hub.base.fingerprint[:12]}. Train it again, or ask for a server with that base.",
            param="model",
        )
    return Model(name, version, f"{_mark(hub)}_{version.digest[:10]}")


def _mark(hub: Hub) -> str:
    return f"fp_{hub.base.fingerprint[:10]}"


def _named(hub: Hub, caller: Principal, name: str) -> list[Version]:
    """All versions of the adapter, if `name` is a caller's `owner/name`."""
    whose, _, suffix = name.partition("/")
    return hub.registry.named(whose, suffix) if whose == caller.owner else []


def _unknown(hub: Hub, caller: Principal, name: str) -> NotFound:
    message = f"The model {name[:200]!r} does not exist, or you do not have access to it. `GET /v1/models` lists yours."
    unreleased = _named(hub, caller, name)
    return NotFound(no_release(unreleased) if unreleased else message, param="model", code="model_not_found")


def model_object(name: str, created: int, owner: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": owner, **more}


@router.get("")
def list_models(hub: TheHub, caller: Choosing) -> dict[str, Any]:
    models = [model_object(hub.base.name, 0, "adapterhub")]
    for version in hub.registry.versions(caller.owner):
        if version.current:
            models.append(model_object(version.alias, version.created_at, version.owner, root=version.model))
        models.append(model_object(version.model, version.created_at, version.owner, root=version.base))
    return {"object": "list", "data": models}


@router.get("/{name:path}")
def retrieve(hub: TheHub, caller: Choosing, name: str) -> dict[str, Any]:
    model = find_model(hub, caller, name)
    if model.version is None:
        return model_object(hub.base.name, 0, "adapterhub")
    return model_object(name, model.version.created_at, caller.owner, root=model.version.base)


@router.delete("/{name:path}")
def delete(hub: TheHub, caller: Training, name: str) -> dict[str, Any]:
    """Deletes one version by its `ft:` name or as `owner/name@which`, or an adapter with all its versions by
    `owner/name`."""
    if name == hub.base.name:
        raise BadRequest("The base cannot be deleted.", param="model")
    if named := _named(hub, caller, name):
        gone = hub.registry.delete_adapter(caller.owner, named[0].adapter)
    elif version := hub.registry.resolve(caller.owner, name):
        gone = [hub.registry.delete_version(caller.owner, version.id)]
    else:
        raise _unknown(hub, caller, name)
    hub.forget(gone)
    return {"id": name, "object": "model", "deleted": True}
