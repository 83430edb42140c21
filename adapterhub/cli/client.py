"""How the command line speaks to a server: one HTTP client, the shared options, and tables or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table

from adapterhub.errors import HubError

Url = Annotated[str, typer.Option("--url", envvar="ADAPTERHUB_URL", help="The server.")]
Key = Annotated[str, typer.Option("--api-key", envvar="ADAPTERHUB_API_KEY", help="Your API key.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
DEFAULT_URL = "http://127.0.0.1:8000"

console = Console(highlight=False)


class Client:
    """Raises HubError with the server's own message, or with what to do when no server answers."""

    def __init__(self, url: str, key: str) -> None:
        if not key:
            raise HubError("No API key. Set ADAPTERHUB_API_KEY, or give --api-key.")
        try:
            self._http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=600)
        except (httpx.InvalidURL, UnicodeEncodeError) as error:
            raise HubError(f"--url {url!r} or the API key cannot be used: {error}.") from error
        self._url = url

    def get(self, path: str, **params: Any) -> Any:
        return _json(self._ask("GET", path, params=params))

    def download(self, path: str) -> bytes:
        return self._ask("GET", path).content

    def post(self, path: str, **body: Any) -> Any:
        return _json(self._ask("POST", path, **body))

    def delete(self, path: str) -> Any:
        return _json(self._ask("DELETE", path))

    def events(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of a streamed answer."""
        with self._reaching(), self._http.stream("POST", path, json=body) as answer:
            if answer.is_error:
                answer.read()
                raise _error(answer)
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
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except httpx.RequestError as error:
            message = f"No answer from {self._url} ({error}). Is `adapterhub serve` running, and is --url right?"
            raise HubError(message) from error


def _json(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError as error:
        raise _stranger(answer) from error


def _error(answer: httpx.Response) -> HubError:
    try:
        return HubError(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return _stranger(answer)


def _stranger(answer: httpx.Response) -> HubError:
    return HubError(f"{answer.url} answered {answer.status_code}. Is it an AdapterHub server?")


def show(value: Any, as_json: bool, columns: Mapping[str, str], title: str = "") -> None:
    """A list of objects as a table of `columns` (heading -> field), or as JSON."""
    if as_json:
        print(json.dumps(value, indent=2, ensure_ascii=False))
        return
    table = Table(title=title or None)
    for heading in columns:
        table.add_column(heading, overflow="fold")
    for item in value:
        table.add_row(*("" if item.get(f) is None else str(item[f]) for f in columns.values()))
    console.print(table)
