"""Answers that take as long as their reader does: parts of them, and what becomes of one whose key ends."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from urllib.parse import urlsplit

import pytest

from adapterhub.api.tenancy.terms import EVERYDAY
from tests.serving import SECONDS, Server, User, eventually

CONTENT = bytes(range(256)) * 20_000  # more than the buffers on the way take


@contextmanager
def slow_reader(server: Server, path: str, key: str) -> Iterator[http.client.HTTPResponse]:
    """Has read the head of an answer, and nothing after that."""
    where = urlsplit(server.url)
    with closing(socket.socket()) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(SECONDS)
        connection.connect((where.hostname, where.port))
        connection.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n\r\n".encode())
        response = http.client.HTTPResponse(connection)
        response.begin()
        yield response


@pytest.mark.parametrize("path", ["/v1/files/{file}/content", "/v1/export"])
def test_a_download_ends_when_its_key_is_revoked(server: Server, user: User, path: str) -> None:
    file = user.upload(CONTENT, purpose="user_data")
    made = server.hub.keys.make(user.owner, EVERYDAY)
    with slow_reader(server, path.format(file=file), made.secret) as response:
        assert response.status == 200
        server.hub.keys.revoke(made.key.id)
        eventually(lambda: not server.gate.inside)
        with pytest.raises(http.client.IncompleteRead):
            response.read()
    assert user.openai.files.content(file).read() == CONTENT


@pytest.mark.parametrize("asked", ["bytes=-", "bytes=9-1", "bytes=a-b", "lines=1-2", "bytes=999999999-"])
def test_a_range_that_there_is_not_is_refused_as_everything_is(user: User, asked: str) -> None:
    file = user.upload(b"0123456789", purpose="user_data")
    answer = user.http.get(f"/v1/files/{file}/content", headers={"range": asked})
    assert answer.status_code in (400, 416)
    assert answer.json()["error"]["param"] == "Range"


def test_a_part_of_a_file_can_be_had(user: User) -> None:
    file = user.upload(b"0123456789", purpose="user_data")
    answer = user.http.get(f"/v1/files/{file}/content", headers={"range": "bytes=2-4"})
    assert (answer.status_code, answer.content) == (206, b"234")
