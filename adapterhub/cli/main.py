"""The command line's root: `serve`, `keys`, `doctor`, and where errors end."""

from __future__ import annotations

import sqlite3
import sys
from pathlib import Path
from typing import Annotated

import typer

from adapterhub import __version__
from adapterhub.cli import adapters, jobs, policy, tiers, users
from adapterhub.cli.client import print_error
from adapterhub.cli.doctor import doctor
from adapterhub.cli.serve import serve
from adapterhub.cli.top import top
from adapterhub.config import default_data_dir
from adapterhub.errors import HubError

app = typer.Typer(
    name="adapterhub",
    help="A server for personal models: one resident base, one LoRA adapter per user, swapped in per request.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
keys = typer.Typer(help="API keys.", no_args_is_help=True)
app.add_typer(keys, name="keys")
app.add_typer(adapters.app, name="adapters")
app.add_typer(jobs.app, name="jobs")
app.add_typer(tiers.app, name="tiers")
app.add_typer(policy.app, name="policy")
app.command()(serve)
app.command()(doctor)
app.command()(users.train)
app.command()(users.chat)
app.command()(top)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@keys.command("create")
def create_key(
    owner: Annotated[str, typer.Argument(help="Whose key it is; a new owner is made if need be.")],
    admin: Annotated[bool, typer.Option("--admin", help="The key may also administer the server.")] = False,
    data_dir: Annotated[Path, typer.Option(help="The server's data directory.")] = default_data_dir(),  # noqa: B008
) -> None:
    """Print a new API key, with or without a server running. It is not shown again."""
    from adapterhub.api.auth import KeyStore
    from adapterhub.swap.database import Database

    database = Database(data_dir.expanduser() / "hub.db")
    try:
        print(KeyStore(database).create(owner, admin=admin))
    finally:
        database.close()


def main() -> None:
    """The `adapterhub` command: errors meant for users are one line on stderr, and exit status 1."""
    try:
        app()
    except (HubError, OSError, sqlite3.Error) as error:
        print_error(str(error))
        sys.exit(1)
