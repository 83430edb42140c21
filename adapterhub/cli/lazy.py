"""Commands that are imported when they are looked up, so that running one costs nothing of the others."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command, get_group


class Commands(UserDict[str, Any]):
    """Commands by name, each given as `module:attribute`: of a function, or of a `typer.Typer` for a group."""

    def __getitem__(self, name: str) -> Any:
        found = self.data[name]
        if isinstance(found, str):
            found = self.data[name] = _built(name, resolve_name(found))
        return found


def group_of(places: Mapping[str, str]) -> type[TyperGroup]:
    """The class, for `typer.Typer(cls=...)`, of a group of the commands at those places."""

    class Group(TyperGroup):
        def __init__(self, **attributes: Any) -> None:
            super().__init__(**attributes)
            self.commands = Commands(places)

    return Group


def _built(name: str, found: Any) -> Any:
    if isinstance(found, typer.Typer):
        command: Any = get_group(found)
    else:
        alone = typer.Typer(add_completion=False)
        alone.command()(found)
        command = get_command(alone)
    command.name = name
    return command
