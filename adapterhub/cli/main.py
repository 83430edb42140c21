"""The command line's root, and where errors end."""

from __future__ import annotations

import sqlite3
import sys
from typing import Annotated

import typer

from adapterhub import __version__
from adapterhub.cli import adapters, jobs, keys, policy, tiers, usage, users
from adapterhub.cli.client import print_error
from adapterhub.cli.doctor import doctor
from adapterhub.cli.erase import app as erase
from adapterhub.cli.serve import serve
from adapterhub.cli.top import top
from adapterhub.errors import HubError

app = typer.Typer(
    name="adapterhub",
    help="A server for personal models: one resident base, one LoRA adapter per user, swapped in per request.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(keys.app, name="keys")
app.add_typer(adapters.app, name="adapters")
app.add_typer(jobs.app, name="jobs")
app.add_typer(tiers.app, name="tiers")
app.add_typer(policy.app, name="policy")
app.add_typer(usage.quotas, name="quotas")
app.add_typer(erase, name="users")
app.command()(serve)
app.command()(doctor)
app.command()(users.train)
app.command()(users.chat)
app.command()(top)
app.command()(usage.usage)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """The `adapterhub` command: errors meant for users are one line on stderr, and exit status 1."""
    try:
        app()
    except (HubError, OSError, sqlite3.Error) as error:
        print_error(str(error))
        sys.exit(1)
