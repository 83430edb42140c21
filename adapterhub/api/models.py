"""`/v1/models`, and what a model's name means to a caller: the base, a version, or the current version of a name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter

from adapterhub.api.auth import Caller, Principal
from adapterhub.api.hub import Hub, TheHub
from adapterhub.errors import BadRequest, NotFound, WrongBase
from adapterhub.swap.versions import Version

router = APIRouter(prefix="/v1/models", tags=["models"])


@dataclass(frozen=True)
class Model:
    """A model that a caller may use; `version` None is the base itself."""

    name: str
    version: Version | None
    system_fingerprint: str


def find_model(hub: Hub, caller: Principal, name: str) -> Model:
    """Raises NotFound, the same for another owner's model as for none; WrongBase for one made for another base."""
    mark = f"fp_{hub.base.fingerprint[:10]}"
    if name == hub.base.name:
        return Model(name, None, mark)
    version = hub.registry.resolve(caller.owner, name)
    if version is None:
        raise NotFound(
            f"The model {name[:200]!r} does not exist, or you do not have access to it. `GET /v1/models` lists yours.",
            param="model",
            code="model_not_found",
        )
    if version.fingerprint != hub.base.fingerprint:
        raise WrongBase(
            f"The model {name!r} was made for base {version.base} {version.fingerprint[:12]}; this server runs "
            f"{hub.base.name} {hub.base.fingerprint[:12]}. Train it again, or ask for a server with that base.",
            param="model",
        )
    return Model(name, version, f"{mark}_{version.digest[:10]}")


def model_object(name: str, created: int, owner: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": owner, **more}


@router.get("")
def list_models(hub: TheHub, caller: Caller) -> dict[str, Any]:
    models = [model_object(hub.base.name, 0, "adapterhub")]
    for version in hub.registry.versions(caller.owner):
        if version.current:
            models.append(model_object(version.alias, version.created_at, version.owner, root=version.model))
        models.append(model_object(version.model, version.created_at, version.owner, root=version.base))
    return {"object": "list", "data": models}


@router.get("/{name:path}")
def retrieve(hub: TheHub, caller: Caller, name: str) -> dict[str, Any]:
    model = find_model(hub, caller, name)
    if model.version is None:
        return model_object(hub.base.name, 0, "adapterhub")
    return model_object(name, model.version.created_at, caller.owner, root=model.version.base)


@router.delete("/{name:path}")
def delete(hub: TheHub, caller: Caller, name: str) -> dict[str, Any]:
    """Deletes one version by its `ft:` name, or an adapter with all its versions by `owner/name`."""
    if name == hub.base.name:
        raise BadRequest("The base cannot be deleted.", param="model")
    version = hub.registry.resolve(caller.owner, name)
    if version is None:
        raise NotFound(f"The model {name[:200]!r} does not exist.", param="model", code="model_not_found")
    if name.startswith("ft:"):
        gone = [hub.registry.delete_version(caller.owner, version.id)]
    else:
        gone = hub.registry.delete_adapter(caller.owner, version.adapter)
    hub.forget(gone)
    return {"id": name, "object": "model", "deleted": True}
