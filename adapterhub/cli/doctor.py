"""`adapterhub doctor`: what this machine can do, and whether the stored data is whole."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich.table import Table

from adapterhub.cli.client import Json, Yes, confirm, console, stderr
from adapterhub.cli.devices import told
from adapterhub.config import Config, cache_dir, default_data_dir, format_bytes
from adapterhub.errors import BadRequest, HubError

if TYPE_CHECKING:
    from adapterhub.swap.repair import Report, Unowned

_SHOWN = 50  # of what a repair would remove


class Finding(NamedTuple):
    check: str
    ok: bool
    detail: str


def doctor(
    data_dir: Annotated[Path, typer.Option(help="The server's data directory.")] = default_data_dir(),  # noqa: B008
    store: Annotated[str | None, typer.Option(help="The object store that the server is started with.")] = None,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Mend what can be mended; remove what nobody owns, once you agree. Stop the server first."
        ),
    ] = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Check the installation, the devices, the base and the stored data. Changes nothing without --repair."""
    config = Config(data_dir=data_dir.expanduser().resolve(), store=store)
    findings = [*_installation(), *_stored(config, repair, yes)]
    if as_json:
        print(json.dumps([f._asdict() for f in findings], indent=2))
    else:
        table = Table("Check", "", "Detail")
        for finding in findings:
            table.add_row(finding.check, "[green]ok[/green]" if finding.ok else "[red]wrong[/red]", finding.detail)
        console.print(table)
    if not all(f.ok for f in findings):
        raise typer.Exit(1)


def _installation() -> Iterator[Finding]:
    import torch
    import transformers

    from adapterhub.api.devices import of_machine

    yield Finding("python", True, platform.python_version())
    yield Finding("torch", True, f"{torch.__version__}, transformers {transformers.__version__}")
    for name, hardware in of_machine().look().items():
        yield Finding(f"device {name}", True, told(hardware.json))
    yield _try("embedded base", _embedded)


def _embedded() -> str:
    from adapterhub.base.embedded import EMBEDDED, find_gguf

    converted = cache_dir() / "bases" / EMBEDDED
    return f"converted, in {converted}" if converted.exists() else f"not converted yet; from {find_gguf()}"


def _stored(config: Config, repairs: bool, yes: bool) -> Iterator[Finding]:
    if not config.database.exists():
        yield Finding("data", True, f"{config.data_dir} holds no server's data yet")
        return
    yield Finding("disk", True, f"{format_bytes(shutil.disk_usage(config.data_dir).free)} free in {config.data_dir}")
    yield _try("database", lambda: _check_database(config))
    yield _try("block files", lambda: _repair_blocks(config, yes) if repairs else _check_blocks(config))


def _check_database(config: Config) -> str:
    from adapterhub.swap.database import Database

    database = Database(config.database)
    try:
        [verdict] = database.rows("pragma integrity_check(1)")
        if verdict["integrity_check"] != "ok":
            raise HubError(f"{config.database}: {verdict['integrity_check']}. Restore it from a backup.")
        return str(config.database)
    finally:
        database.close()


def _check_blocks(config: Config) -> str:
    from adapterhub.swap.database import Database
    from adapterhub.swap.repair import inspect

    database = Database(config.database)
    try:
        return _told(inspect(database, config.blobs_dir, config.store, config.data_dir))
    finally:
        database.close()


def _repair_blocks(config: Config, yes: bool) -> str:
    from adapterhub.swap.database import Database
    from adapterhub.swap.files import lock_directory
    from adapterhub.swap.repair import repair

    lock = lock_directory(config.data_dir)
    if lock is None:
        raise BadRequest(f"A server is using {config.data_dir}. Stop it before you repair what it keeps there.")
    database = Database(config.database)

    def agree(unowned: Unowned) -> None:
        _ask_to_remove(unowned, yes)

    try:
        return _told(repair(database, config.blobs_dir, config.store, config.data_dir, agree))
    finally:
        database.close()
        os.close(lock)


def _ask_to_remove(unowned: Unowned, yes: bool) -> None:
    """Names what nobody owns, if there is any, and asks whether it may go."""
    names = [str(path) for path in unowned.files]
    names += [f"{found.digest}, {format_bytes(found.nbytes)} in the store" for found in unowned.objects]
    if not names:
        return
    for name in names[:_SHOWN]:
        stderr.print(name, soft_wrap=True, markup=False)
    if len(names) > _SHOWN:
        stderr.print(f"... and {len(names) - _SHOWN} more")
    count = f"{len(unowned.files)} file(s) and {len(unowned.objects)} object(s) in the store"
    confirm(f"Remove {count}, which no version names? This cannot be undone.", yes)


def _told(report: Report) -> str:
    """Raises HubError with all of it when something is wrong."""
    lines = [str(fault) for fault in report.faults]
    for url, count in report.unseen.items():
        lines.append(f"{count} version(s) lie in {url} alone: give --store {url} to look at them")
    good = report.versions - len(report.faults) - sum(report.unseen.values())
    lines.append(f"{good} of {report.versions} version(s) whole, every digest right")
    if report.in_store:
        lines.append(f"{report.in_store} of them in the store alone, whose bytes are checked when they are fetched")
    if report.unnamed:
        lines.append(f"{report.unnamed} object(s) in the store that no version names: --repair removes them")
    lines += [f"mended: {name}" for name in report.mended]
    if report.removed:
        lines.append(f"removed {report.removed} file(s) and object(s) that no version names")
    if report.faults:
        raise HubError("\n".join(lines))
    return "\n".join(lines)


def _try(check: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(check, True, look())
    except (HubError, sqlite3.Error) as error:
        return Finding(check, False, str(error))
