"""`adapterhub doctor`: what this machine can do, and whether the stored data is whole."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.table import Table

from adapterhub.cli.client import Json, console
from adapterhub.config import Config, cache_dir, default_data_dir, format_bytes
from adapterhub.errors import BlockDamaged, HubError


class Finding(NamedTuple):
    check: str
    ok: bool
    detail: str


def doctor(
    data_dir: Annotated[Path, typer.Option(help="The server's data directory.")] = default_data_dir(),  # noqa: B008
    as_json: Json = False,
) -> None:
    """Check the installation, the device, the base and the stored data. Changes nothing."""
    config = Config(data_dir=data_dir.expanduser().resolve())
    findings = [*_installation(), *_stored(config)]
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


def _stored(config: Config) -> Iterator[Finding]:
    if not config.database.exists():
        yield Finding("data", True, f"{config.data_dir} holds no server's data yet")
        return
    yield Finding("disk", True, f"{format_bytes(shutil.disk_usage(config.data_dir).free)} free in {config.data_dir}")
    yield _try("database", lambda: _check_database(config))
    yield _try("block files", lambda: _check_blocks(config))


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
    from adapterhub.swap.block import block_path
    from adapterhub.swap.database import Database
    from adapterhub.swap.registry import Registry

    database = Database(config.database)
    try:
        registry = Registry(database, config.blobs_dir, config.disk_bytes)
        versions, damaged = registry.versions(), []
        for version in versions:
            try:
                registry.block(version)
            except BlockDamaged as error:
                path = block_path(config.blobs_dir, version.digest)
                damaged.append(f"{version.alias}, version {version.number}, in {path}: {error}")
        if damaged:
            raise HubError("\n".join(damaged))
        return f"{len(versions)} version(s), every digest right"
    finally:
        database.close()


def _try(check: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(check, True, look())
    except (HubError, sqlite3.Error) as error:
        return Finding(check, False, str(error))
