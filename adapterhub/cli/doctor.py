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

from adapterhub.cli.client import Json, console
from adapterhub.config import Config, cache_dir, default_data_dir, format_bytes
from adapterhub.errors import BadRequest, HubError

if TYPE_CHECKING:
    from adapterhub.swap.repair import Report


class Finding(NamedTuple):
    check: str
    ok: bool
    detail: str


def doctor(
    data_dir: Annotated[Path, typer.Option(help="The server's data directory.")] = default_data_dir(),  # noqa: B008
    store: Annotated[str | None, typer.Option(help="The object store that the server is started with.")] = None,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Mend what can be mended, and remove what nobody owns. Stop the server first."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Check the installation, the device, the base and the stored data. Changes nothing without --repair."""
    config = Config(data_dir=data_dir.expanduser().resolve(), store=store)
    findings = [*_installation(), *_stored(config, repair)]
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

    yield Finding("python", True, platform.python_version())
    yield Finding("torch", True, f"{torch.__version__}, transformers {transformers.__version__}")
    if torch.cuda.is_available():
        yield Finding("device", True, f"cuda:0 {torch.cuda.get_device_name(0)}")
    else:
        yield Finding("device", True, f"cpu, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    yield _try("embedded base", _embedded)


def _embedded() -> str:
    from adapterhub.base.embedded import EMBEDDED, find_gguf

    converted = cache_dir() / "bases" / EMBEDDED
    return f"converted, in {converted}" if converted.exists() else f"not converted yet; from {find_gguf()}"


def _stored(config: Config, repairs: bool) -> Iterator[Finding]:
    if not config.database.exists():
        yield Finding("data", True, f"{config.data_dir} holds no server's data yet")
        return
    yield Finding("disk", True, f"{format_bytes(shutil.disk_usage(config.data_dir).free)} free in {config.data_dir}")
    yield _try("database", lambda: _check_database(config))
    yield _try("block files", lambda: _repair_blocks(config) if repairs else _check_blocks(config))


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


def _repair_blocks(config: Config) -> str:
    from adapterhub.swap.database import Database
    from adapterhub.swap.files import lock_directory
    from adapterhub.swap.repair import repair

    lock = lock_directory(config.data_dir)
    if lock is None:
        raise BadRequest(f"A server is using {config.data_dir}. Stop it before you repair what it keeps there.")
    database = Database(config.database)
    try:
        return _told(repair(database, config.blobs_dir, config.store, config.data_dir))
    finally:
        database.close()
        os.close(lock)


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
        lines.append(f"removed {report.removed} file(s) that no version names")
    if report.faults:
        raise HubError("\n".join(lines))
    return "\n".join(lines)


def _try(check: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(check, True, look())
    except (HubError, sqlite3.Error) as error:
        return Finding(check, False, str(error))
