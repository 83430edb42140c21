"""The command line's root, and where errors end."""

from __future__ import annotations

import sqlite3
import sys
from typing import Annotated

import typer

from adapterhub.cli.client import print_error
from adapterhub.cli.lazy import group_of
from adapterhub.errors import HubError

_COMMANDS = {
    "serve": "adapterhub.cli.serve:serve",
    "doctor": "adapterhub.cli.doctor:doctor",
    "train": "adapterhub.cli.users:train",
    "chat": "adapterhub.cli.users:chat",
    "top": "adapterhub.cli.top:top",
    "usage": "adapterhub.cli.usage:usage",
    "keys": "adapterhub.cli.keys:app",
    "adapters": "adapterhub.cli.adapters:app",
    "jobs": "adapterhub.cli.jobs:app",
    "tiers": "adapterhub.cli.tiers:app",
    "policy": "adapterhub.cli.policy:app",
    "quotas": "adapterhub.cli.usage:quotas",
    "users": "adapterhub.cli.erase:app",
}

app = typer.Typer(
    cls=group_of(_COMMANDS),
    name="adapterhub",
    help="A server for personal models: one resident base, one LoRA adapter per user, swapped in per request.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from adapterhub import __version__

        print(__version__)
        raise typer.Exit


def main() -> None:
    """The `adapterhub` command: errors meant for users are one line on stderr, and exit status 1."""
    try:
        app()
    except (HubError, OSError, sqlite3.Error) as error:
        print_error(str(error))
        sys.exit(1)
