"""`adapterhub keys`: API keys, made, listed, rotated and revoked in the data directory, with or without a server that
runs on it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapterhub.api.tenancy.terms import EVERYDAY, PROJECT, Scope
from adapterhub.cli.client import Json, console, show
from adapterhub.cli.formats import ago, duration, parse_duration
from adapterhub.config import default_data_dir
from adapterhub.errors import BadRequest, NotFound

if TYPE_CHECKING:
    from adapterhub.api.tenancy.keys import ApiKey, KeyStore

app = typer.Typer(help="API keys.", no_args_is_help=True)
DataDir = Annotated[Path, typer.Option(help="The server's data directory.")]
_DATA_DIR = default_data_dir()
_COLUMNS = {
    "Id": "id",
    "Owner": "owner",
    "Project": "project",
    "Scopes": "scopes",
    "Key": "hint",
    "State": "state",
    "Last use": "last_use",
}


@app.command("create")
def create_key(
    owner: Annotated[str, typer.Argument(help="Whose key it is; a new owner is made if need be.")],
    admin: Annotated[bool, typer.Option("--admin", help="The key may also administer the server.")] = False,
    scope: Annotated[
        list[Scope] | None, typer.Option(help="What the key may do, repeatable; by default infer, train and read.")
    ] = None,
    project: Annotated[str, typer.Option(help="What it is used for: usage is told apart by it.")] = PROJECT,
    expires: Annotated[str | None, typer.Option(help="For how long it is good, as in 12h or 90d.")] = None,
    data_dir: DataDir = _DATA_DIR,
) -> None:
    """Print a new API key, with or without a server running. It is not shown again."""
    if admin and scope:
        raise BadRequest("--admin gives all scopes. Give it, or --scope.")
    scopes = frozenset(Scope) if admin else frozenset(scope or EVERYDAY)
    expires_at = None if expires is None else int(time.time()) + round(parse_duration(expires))
    with _keys(data_dir) as keys:
        print(keys.make(owner, scopes, project=project, expires_at=expires_at).secret)


@app.command("list")
def list_keys(
    owner: Annotated[str | None, typer.Option(help="Only this owner's.")] = None,
    project: Annotated[str | None, typer.Option(help="Only this project's.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Those that are good no more, too.")] = False,
    as_json: Json = False,
    data_dir: DataDir = _DATA_DIR,
) -> None:
    """List the keys, the newest first. None is shown whole."""
    with _keys(data_dir) as keys:
        found = [key for key in keys.list(owner, project) if everything or key.state == "active"]
    show([_row(key) if not as_json else _object(key) for key in found], as_json, _COLUMNS)


@app.command("revoke")
def revoke_keys(
    keys: Annotated[list[str], typer.Argument(help="Ids of keys, or the keys themselves.")],
    data_dir: DataDir = _DATA_DIR,
) -> None:
    """Make keys good for nothing, at once: a server that runs ends what it is answering on their behalf."""
    with _keys(data_dir) as store:
        for found in [_found(store, key) for key in keys]:
            revoked = store.revoke(found.id)
            console.print(f"Revoked {revoked.id} of {revoked.owner}, project {revoked.project}")


@app.command("rotate")
def rotate_key(
    key: Annotated[str, typer.Argument(help="The id of a key, or the key itself.")],
    grace: Annotated[str, typer.Option(help="For how long the old key is good, too, as in 1h; 0 for no more.")] = "1d",
    data_dir: DataDir = _DATA_DIR,
) -> None:
    """Print a new key that may do what the old one may. It is not shown again."""
    with _keys(data_dir) as store:
        print(store.rotate(_found(store, key).id, round(parse_duration(grace))).secret)


@contextmanager
def _keys(data_dir: Path) -> Iterator[KeyStore]:
    from adapterhub.api.tenancy.keys import KeyStore
    from adapterhub.swap.database import Database

    database = Database(data_dir.expanduser() / "hub.db")
    try:
        yield KeyStore(database)
    finally:
        database.close()


def _found(keys: KeyStore, key: str) -> ApiKey:
    """By its id or its secret. Raises NotFound, which does not repeat a secret."""
    from adapterhub.api.tenancy.keys import PREFIX

    if not key.startswith(PREFIX):
        return keys.get(key)
    if (found := keys.find(key)) is None:
        raise NotFound("There is no such key. `adapterhub keys list --all` shows all.")
    return found


def _object(key: ApiKey) -> dict[str, Any]:
    return {**vars(key), "scopes": sorted(key.scopes), "state": key.state}


def _row(key: ApiKey) -> dict[str, Any]:
    state = key.state
    if state == "active" and key.expires_at is not None:
        ends = f"{state}, {duration(key.expires_at - time.time())} left"
    else:
        ends = str(state)
    return {**_object(key), "scopes": " ".join(sorted(key.scopes)), "state": ends, "last_use": ago(key.last_used_at)}
