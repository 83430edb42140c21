"""How the command line speaks to a server, and to whoever runs it: one HTTP client, the shared options, tables or JSON,
and a question before what cannot be undone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from adapterhub.errors import Forbidden, HubError, NotFound, Unauthorized

if TYPE_CHECKING:
    import httpx

Url = Annotated[str, typer.Option("--url", envvar="ADAPTERHUB_URL", help="The server.")]
Key = Annotated[str, typer.Option("--api-key", envvar="ADAPTERHUB_API_KEY", help="Your API key.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
DEFAULT_URL = "http://127.0.0.1:8000"

_PAGE = 1000  # items that one request of a list asks for

console = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)


class Unreachable(HubError):
    """No server answers, or one that is none of ours."""


class Client:
    """Raises HubError with the server's own message (Unauthorized, Forbidden and NotFound for what they are), and
    Unreachable, with what to do, when no server answers."""

    def __init__(self, url: str, key: str) -> None:
        import httpx

        if not key:
            raise HubError("No API key. Set ADAPTERHUB_API_KEY, or give --api-key.")
        options: dict[str, Any] = {"headers": {"Authorization": f"Bearer {key}"}, "timeout": 600}
        if url.startswith("http://"):
            options["verify"] = False  # there is nothing to verify, and reading the certificates takes 20 ms
        try:
            self._http = httpx.Client(base_url=url, **options)
        except (httpx.InvalidURL, UnicodeEncodeError) as error:
            raise HubError(f"--url {url!r} or the API key cannot be used: {error}.") from error
        self._url = url

    def get(self, path: str, **params: Any) -> Any:
        return _json(self._ask("GET", path, params=params))

    def pages(self, path: str, *, limit: int | None = None, **params: Any) -> Iterator[dict[str, Any]]:
        """The pages of a list one after the other, until `limit` items (None: all) have been seen."""
        while limit is None or limit > 0:
            page = self.get(path, limit=_PAGE if limit is None else min(limit, _PAGE), **params)
            yield page
            if not page["has_more"]:
                return
            limit = None if limit is None else limit - len(page["data"])
            params["after"] = page["last_id"]

    def items(self, path: str, **params: Any) -> list[dict[str, Any]]:
        """All items of a list."""
        return [item for page in self.pages(path, **params) for item in page["data"]]

    def download(self, path: str, out: BinaryIO, on_bytes: Callable[[int], object] = int, **params: Any) -> None:
        """`on_bytes` is told how many came, each time that some have been written."""
        with self._streaming("GET", path, params=params) as answer:
            for chunk in answer.iter_bytes():
                out.write(chunk)
                on_bytes(len(chunk))

    def post(self, path: str, **body: Any) -> Any:
        return _json(self._ask("POST", path, **body))

    def put(self, path: str, body: Any) -> Any:
        return _json(self._ask("PUT", path, json=body))

    def patch(self, path: str, body: Any, **params: Any) -> Any:
        return _json(self._ask("PATCH", path, json=body, params=params))

    def delete(self, path: str) -> Any:
        return _json(self._ask("DELETE", path))

    def events(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of a streamed answer."""
        with self._streaming("POST", path, json=body) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        raise HubError(chunk["error"]["message"])
                    yield chunk

    def _ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        with self._reaching():
            answer = self._http.request(method, path, **options)
        if answer.is_error:
            raise _error(answer)
        return answer

    @contextmanager
    def _streaming(self, method: str, path: str, **options: Any) -> Iterator[httpx.Response]:
        with self._reaching(), self._http.stream(method, path, **options) as answer:
            if answer.is_error:
                answer.read()
                raise _error(answer)
            yield answer

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        import httpx

        try:
            yield
        except httpx.RequestError as error:
            message = f"No answer from {self._url} ({error}). Is `adapterhub serve` running, and is --url right?"
            raise Unreachable(message) from error


def _json(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError as error:
        raise _stranger(answer) from error


def _error(answer: httpx.Response) -> HubError:
    kinds = {kind.status: kind for kind in (Unauthorized, Forbidden, NotFound)}
    try:
        return kinds.get(answer.status_code, HubError)(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return _stranger(answer)


def _stranger(answer: httpx.Response) -> HubError:
    return Unreachable(f"{answer.url} answered {answer.status_code}. Is it an AdapterHub server?")


def show(
    value: Any, as_json: bool, columns: Mapping[str, str], *, title: str = "", right: Collection[str] = ()
) -> None:
    """A list of objects as a table of `columns`, or as JSON."""
    if as_json:
        print_json(value)
    else:
        console.print(table_of(value, columns, title=title, right=right))


def table_of(
    items: Iterable[Mapping[str, Any]], columns: Mapping[str, str], *, title: str = "", right: Collection[str] = ()
) -> Table:
    """A row for each object: its fields under the headings of `columns`, those in `right` set to the right."""
    table = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for heading in columns:
        table.add_column(heading, overflow="fold", justify="right" if heading in right else "left")
    for item in items:
        table.add_row(*("" if item.get(f) is None else Text(str(item[f])) for f in columns.values()))
    return table


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_error(message: str) -> None:
    """One line on stderr."""
    stderr.print(f"[red]error:[/red] {escape(' '.join(message.split()))}", soft_wrap=True)


def confirm(question: str, yes: bool) -> None:
    """Goes on if `yes` was given or is answered, and ends the command otherwise. Raises HubError where nobody can be
    asked."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise HubError(f"{question} Nothing was done, as standard input is no terminal to answer on: give --yes.")
    from rich.prompt import Confirm

    if not Confirm.ask(escape(question), default=False, console=console):
        console.print("Nothing was done.")
        raise typer.Exit(1)
