"""`adapterhub adapters import`: PEFT directories and zips of them, one or many."""

from __future__ import annotations

import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from adapterhub.cli.client import (
    DEFAULT_URL,
    Client,
    Json,
    Key,
    Unreachable,
    Url,
    console,
    print_error,
    print_json,
    stderr,
)
from adapterhub.errors import HubError, Unauthorized

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
Imported = dict[str, Any]
Failed = dict[str, str]


@dataclass(frozen=True)
class Source:
    """One PEFT adapter, wherever it lies. `where` names it in messages, `name` is what it is called if nobody says."""

    where: str
    name: str
    has: Callable[[str], bool]
    open: Callable[[str], AbstractContextManager[IO[bytes]]]


def import_adapters(
    paths: Annotated[
        list[Path],
        typer.Argument(help="PEFT directories, zip files with PEFT directories, or directories of either."),
    ],
    name: Annotated[
        str | None, typer.Option(help="The adapter's name, if there is one; by default its directory's.")
    ] = None,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Import PEFT adapters; under a name that exists, one becomes the next version.

    One that fails does not hold up the others; the exit status is then 1.
    """
    sources = [source for path in paths for source in find_sources(path)]
    _check_names(sources, name)
    client = Client(url, key)
    failed: list[Failed] = []
    if len(sources) == 1:
        imported = [_import(client, sources[0], name or sources[0].name)]
        if not as_json:
            _say(imported[0], console)
    else:
        imported, failed = _import_many(client, sources, as_json)
    if as_json:
        print_json({"imported": imported, "failed": failed})
    if failed:
        raise typer.Exit(1)


def _import_many(
    client: Client, sources: list[Source], as_json: bool
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """What was imported, and what failed and why. Says so, above a progress bar where there is a terminal."""
    imported: list[Imported] = []
    failed: list[Failed] = []
    bar = stderr.is_terminal
    columns = (TextColumn("Importing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, disable=not bar, transient=True) as progress:
        for source in progress.track(sources):
            try:
                answer = _import(client, source, source.name)
            except (HubError, OSError) as error:
                failed.append({"source": source.where, "message": str(error)})
                print_error(f"{source.where}: {error}")
                if isinstance(error, Unreachable | Unauthorized):  # as all others would
                    break
            else:
                imported.append(answer)
                if not as_json:
                    _say(answer, stderr if bar else console)
    if not as_json:
        left = len(sources) - len(imported) - len(failed)
        console.print(f"{len(imported)} imported, {len(failed)} failed{f', {left} not tried' if left else ''}.")
    return imported, failed


def find_sources(path: Path) -> list[Source]:
    """The adapters at `path`. Raises HubError when there are none."""
    if path.is_dir():
        sources = _in_directory(path)
        if not sources:
            raise HubError(f"{path} has no {CONFIG_FILE}, and no directory or zip in it that has one.")
        return sources
    if not path.is_file():
        raise HubError(f"{path} does not exist.")
    sources = _in_zip(path)
    if not sources:
        raise HubError(f"{path} is a zip without an {CONFIG_FILE}.")
    return sources


def _in_directory(path: Path) -> list[Source]:
    if (path / CONFIG_FILE).is_file():
        return [_directory(path)]
    found: list[Source] = []
    for entry in sorted(path.iterdir()):
        if (entry / CONFIG_FILE).is_file():
            found.append(_directory(entry))
        elif entry.suffix.lower() == ".zip" and entry.is_file():
            try:
                found += _in_zip(entry)
            except HubError as error:  # it fails when its turn comes, and does not hold up the others
                found.append(_unreadable(entry, error))
    return found


def _unreadable(path: Path, error: HubError) -> Source:
    def refuse(_: str) -> NoReturn:
        raise error

    return Source(str(path), path.stem, refuse, refuse)


def _directory(path: Path) -> Source:
    return Source(
        str(path), path.resolve().name, lambda name: (path / name).is_file(), lambda name: (path / name).open("rb")
    )


def _in_zip(path: Path) -> list[Source]:
    """Nothing is unpacked: members are read where they lie."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = frozenset(archive.namelist())
    except zipfile.BadZipFile as error:
        raise HubError(f"{path} is neither a directory nor a zip file ({error}).") from error
    folders = sorted({PurePosixPath(m).parent for m in members if PurePosixPath(m).name == CONFIG_FILE})
    return [_zipped(path, folder, members, alone=len(folders) == 1) for folder in folders]


def _zipped(path: Path, folder: PurePosixPath, members: frozenset[str], *, alone: bool) -> Source:
    @contextmanager
    def opened(name: str) -> Iterator[IO[bytes]]:
        try:
            with zipfile.ZipFile(path) as archive, archive.open(str(folder / name)) as member:
                yield member
        except (zipfile.BadZipFile, zlib.error, RuntimeError) as error:  # damaged, encrypted, of a kind unheard of
            raise HubError(f"{path} cannot be read: {error}.") from error

    where = str(path) if alone else f"{path}:{folder}"
    return Source(where, folder.name or path.stem, lambda name: str(folder / name) in members, opened)


def _check_names(sources: list[Source], name: str | None) -> None:
    """Two of one name would become versions of one adapter, which nobody means. Raises HubError."""
    if name is not None and len(sources) > 1:
        raise HubError(f"--name is for one adapter, and these are {len(sources)}. Leave it out, or import one by one.")
    name, count = Counter(s.name for s in sources).most_common(1)[0]
    if count > 1:
        places = ", ".join(s.where for s in sources if s.name == name)
        raise HubError(f"{count} of these would be called {name!r}: {places}. Import them one by one, with --name.")


def _import(client: Client, source: Source, name: str) -> Imported:
    for needed in (CONFIG_FILE, WEIGHTS_FILE):
        if not source.has(needed):
            hint = " Its weights are a pickle, which is never read: save it as safetensors."
            raise HubError(
                f"{source.where} has no {needed}; a PEFT directory needs it.{hint if source.has(PICKLE_FILE) else ''}"
            )
    with source.open(CONFIG_FILE) as config, source.open(WEIGHTS_FILE) as weights:
        files = {"config": (CONFIG_FILE, config), "weights": (WEIGHTS_FILE, weights)}
        return {"source": source.where, **client.post("/v1/adapters", data={"name": name}, files=files)}


def _say(imported: Imported, out: Console) -> None:
    out.print(f"Imported as [bold]{imported['model']}[/bold], version {imported['versions'][0]['number']}.")
    for warning in imported["warnings"]:
        out.print(f"[yellow]warning:[/yellow] {imported['model']}: {warning}.")
