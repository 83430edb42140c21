"""Who can reach a server that asks for no key: this machine's own programs, and not what its browsers were sent.

A page from anywhere may have a browser post to 127.0.0.1, and may have its own name point there. So a request must name
this machine as its host, and as its origin where it has one.
"""

from __future__ import annotations

from starlette.datastructures import Headers

from adapterhub.config import is_loopback
from adapterhub.errors import Forbidden


def check_local(headers: Headers) -> None:
    """Raises Forbidden."""
    for name in ("host", "origin"):
        value = headers.get(name)
        if value is not None and not is_loopback(_hostname(value)):
            raise Forbidden(
                f"This server was started with --no-auth: it answers requests to its machine's loopback address alone, "
                f"and this one has the {name} {value[:80]!r}."
            )


def _hostname(value: str) -> str:
    """`https://[::1]:8000` -> `::1`"""
    place = value.rpartition("://")[2]
    return place[1:].partition("]")[0] if place.startswith("[") else place.partition(":")[0]
