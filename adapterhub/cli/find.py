"""Adapters as the command line names them, and under which route a key may ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any, NamedTuple
from urllib.parse import quote

import typer

from adapterhub.cli.client import Client
from adapterhub.errors import Forbidden, HubError, NotFound

_WHICH = "An adapter's name, its owner/name, or its id; another owner's needs an admin key."
Which = Annotated[str, typer.Argument(help=_WHICH)]
Several = Annotated[list[str], typer.Argument(help=_WHICH.replace("An adapter's name", "Adapters: each one's name"))]


class Found(NamedTuple):
    adapter: dict[str, Any]
    route: str  # under which the key may ask for it


def find(client: Client, which: Sequence[str]) -> list[Found]:
    """Adapters by name, `owner/name` or id, each once: the key's owner's, and for an admin key by the latter two
    anybody's. Raises HubError when there is none of a name, before anything is done to the others."""
    found = {one.adapter["id"]: one for one in (_find(client, w) for w in which)}
    return list(found.values())


def _find(client: Client, which: str) -> Found:
    owner, _, name = which.rpartition("/")
    lookups: list[tuple[str, dict[str, str]]] = [("/v1/adapters", {"name": name})]
    if owner:
        lookups.append(("/admin/adapters", {"owner": owner, "name": name}))
    for path, query in lookups:
        with suppress(Forbidden):  # no admin key: then it is as if it was not there
            for adapter in client.items(path, **query):
                if which in (adapter["name"], adapter["model"]):
                    return Found(adapter, f"{path}/{adapter['id']}")
    if which.startswith("adapter-"):
        for path in ("/v1/adapters", "/admin/adapters"):
            with suppress(NotFound, Forbidden):
                route = f"{path}/{quote(which, safe='')}"
                return Found(client.get(route), route)
    raise HubError(f"You have no adapter {which!r}. `adapterhub adapters list` shows yours.")
