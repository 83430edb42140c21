"""Clients that are slow, silent or gone, heads without end, servers that stop or have no keys, and what is logged."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI

from adapterhub.api.app import create_app
from adapterhub.api.connection import MAX_HEAD, Connection
from adapterhub.api.server import Server as HttpServer
from adapterhub.api.server import listen
from adapterhub.base.model import load_base
from adapterhub.config import MIB, Config
from adapterhub.errors import BadRequest
from tests.serving import BASE, SECONDS, PeftFiles, Server, User, chat_lines, eventually, process, running, small_config
from tests.test_bad_input import CHAT, HELLO, refused

JSON = {"content-type": "application/json"}


class Hurried(Connection):
    head_seconds = 0.2
    stall_seconds = 1.0


@pytest.fixture(scope="module")
def hurried(base_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that waits for nobody."""
    config = small_config(base_directory, tmp_path_factory.mktemp("hurried"), body_seconds=0.2)
    with running(config, connection=Hurried) as started:
        yield started


def connected(server: Server) -> socket.socket:
    where = urlsplit(server.url)
    return socket.create_connection((where.hostname, where.port), timeout=SECONDS)


def all_of(connection: socket.socket) -> bytes:
    """What comes until the server hangs up."""
    said = b""
    with suppress(ConnectionResetError):
        while more := connection.recv(65536):
            said += more
    return said


def error_in(said: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = said.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


# -- slow, silent, gone


@pytest.mark.parametrize("said", [b"", b"GET /v1/mo", b"GET /v1/models HTTP/1.1\r\nhost: x\r\n", b"\r\n"])
def test_a_head_that_does_not_end_is_hung_up_on(hurried: Server, said: bytes) -> None:
    with connected(hurried) as connection:
        connection.sendall(said)
        assert all_of(connection) == b""


def test_a_second_head_that_does_not_end_is_hung_up_on_too(hurried: Server) -> None:
    with connected(hurried) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\nGET /healthz HTTP")
        assert all_of(connection).count(b"HTTP/1.1 200") == 1


def test_a_body_that_comes_too_slowly_is_refused(hurried: Server) -> None:
    key = hurried.user().key.encode()
    for path, kind in ((b"/v1/files", b"multipart/form-data; boundary=b"), (CHAT.encode(), b"application/json")):
        with connected(hurried) as connection:
            connection.sendall(
                b"POST " + path + b" HTTP/1.1\r\nhost: x\r\nauthorization: Bearer " + key
                + b"\r\ncontent-length: 1000\r\ncontent-type: " + kind + b"\r\n\r\n--b\r\n"
            )  # fmt: skip
            status, error = error_in(all_of(connection))
            assert (status, error["code"]) == (408, "request_timeout")


def test_who_does_not_read_an_answer_is_hung_up_on(hurried: Server) -> None:
    user = hurried.user()
    file = user.upload(b"x" * (5 * MIB), purpose="user_data")
    with connected(hurried) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        head = f"GET /v1/files/{file}/content HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {user.key}\r\n\r\n"
        connection.sendall(head.encode())
        eventually(lambda: hurried.gate.inside == 1)
        eventually(lambda: hurried.gate.inside == 0)
        assert len(all_of(connection)) < 5 * MIB


def deleted_files_held() -> int:
    held = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            held += "(deleted)" in str(link.readlink())
    return held


def test_an_upload_that_is_dropped_leaves_nothing(server: Server, user: User) -> None:
    stored, held = server.stored(), deleted_files_held()
    head = (
        f"POST /v1/files HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {user.key}\r\ncontent-length: {5 * MIB}\r\n"
        "content-type: multipart/form-data; boundary=b\r\n\r\n"
        '--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        '--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
    )
    for _ in range(3):
        with connected(server) as connection:
            connection.sendall(head.encode() + b"x" * (3 * MIB))
            eventually(lambda: deleted_files_held() > held)
        eventually(lambda: server.gate.inside == 0 and deleted_files_held() == held)
    assert server.stored() == stored
    assert user.openai.files.list().data == []


# -- heads


@pytest.mark.parametrize(
    "said",
    [
        b"GET /healthz HTTP/1.1\r\nhost: x\r\nx-a: " + b"a" * MAX_HEAD + b"\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nhost: x\r\n" + b"x-a: a\r\n" * (MAX_HEAD // 4) + b"\r\n",
        b"GET /healthz?" + b"a" * MAX_HEAD + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nhost: x\r\nx-a: " + b"a" * (2 * MAX_HEAD),
    ],
    ids=["one header", "many headers", "the path", "without an end"],
)
def test_a_head_that_is_too_large_is_refused(server: Server, said: bytes) -> None:
    with connected(server) as connection:
        connection.sendall(said)
        status, error = error_in(all_of(connection))
    assert (status, error["code"]) == (431, "headers_too_large")
    assert "64.0 KiB" in error["message"]


def test_a_head_just_below_the_limit_is_read(server: Server) -> None:
    answer = httpx.get(f"{server.url}/healthz", headers={"x-a": "a" * (MAX_HEAD - 1000)}, timeout=SECONDS)
    assert answer.status_code == 200


def test_every_answer_carries_the_security_headers_and_an_id(server: Server, user: User) -> None:
    answers = [
        user.http.get("/v1/models"),
        user.http.get("/healthz"),
        user.http.get("/nothing"),
        user.http.put("/v1/models"),
        user.http.post(CHAT, content=b"{", headers=JSON),
        user.http.post(CHAT, json={"model": BASE, "messages": HELLO, "max_tokens": 1, "stream": True}),
        httpx.get(f"{server.url}/v1/models"),
    ]
    assert {answer.status_code for answer in answers} == {200, 400, 401, 404, 405}
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-request-id"].startswith("req-")
        assert "server" not in answer.headers


def test_there_are_no_pages_that_run_scripts(server: Server) -> None:
    for path in ("/docs", "/redoc"):
        assert httpx.get(f"{server.url}{path}").status_code == 404


# -- stopping


class Held:
    """A server in a thread with a request that is answered when the test says so."""

    def __init__(self, config: Config, drain_seconds: float) -> None:
        self.app: FastAPI = create_app(config, load_base(config))
        self.let_go: asyncio.Event | None = None

        @self.app.get("/v1/held")
        async def held() -> dict[str, str]:
            self.let_go = asyncio.Event()
            self.loop = asyncio.get_running_loop()
            await self.let_go.wait()
            return {"said": "all of it"}

        listener = listen("127.0.0.1", 0)
        self.http = HttpServer(self.app, listener, drain_seconds=drain_seconds)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever)
        self.thread.start()
        eventually(lambda: self.http.started or not self.thread.is_alive())

    def user(self) -> User:
        return User(self.url, "somebody", self.app.state.hub.keys.create("somebody"))


def test_a_server_that_stops_refuses_new_requests_and_ends_those_it_has(base_directory: Path, tmp_path: Path) -> None:
    server = Held(small_config(base_directory, tmp_path), drain_seconds=SECONDS)
    with ThreadPoolExecutor(1) as pool:
        user = server.user()
        assert user.http.get("/readyz").json() == {"status": "ready"}
        under_way = pool.submit(user.http.get, "/v1/held")
        eventually(lambda: server.let_go)
        server.http.should_exit = True
        eventually(lambda: user.http.get("/readyz").status_code == 503)
        assert user.http.get("/readyz").json() == {"status": "stopping"}
        assert user.http.get("/healthz").status_code == 200
        answer = user.http.post(CHAT, json={"model": BASE, "messages": HELLO})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "server_stopping")
        assert answer.headers["retry-after"]
        assert server.let_go is not None
        server.loop.call_soon_threadsafe(server.let_go.set)
        assert under_way.result(SECONDS).json() == {"said": "all of it"}
        user.close()
    server.thread.join(SECONDS)
    assert not server.thread.is_alive()


def test_an_answer_that_does_not_end_in_time_says_why(base_directory: Path, tmp_path: Path) -> None:
    server = Held(small_config(base_directory, tmp_path), drain_seconds=0)
    user, go_on = server.user(), threading.Event()
    body = {"model": BASE, "messages": HELLO, "max_tokens": 300, "ignore_eos": True, "stream": True}
    with user.http.stream("POST", CHAT, json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.app.state.hub.engine.evict("nothing").result(SECONDS)
        server.app.state.hub.engine.engines[0]._inbox.put(lambda: go_on.wait(SECONDS))  # no token comes any more
        server.http.should_exit = True
        last = [line for line in lines if line][-1]
    go_on.set()
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "unavailable"
    user.close()
    server.thread.join(SECONDS)
    assert not server.thread.is_alive()


def test_sigterm_lets_a_stream_end_and_logs_hold_no_data(
    base_directory: Path, adapter: PeftFiles, tmp_path: Path
) -> None:
    with process(base_directory, tmp_path / "data", "--log-format", "json") as server:
        user = server.start().user("somebody")
        user.import_adapter(adapter, "zanzibar")
        user.http.get("/v1/models/somebody/zanzibar-2")
        user.http.post(CHAT, content=b'{"zanzibar', headers=JSON)
        user.job(user.train(b'{"messages": "zanzibar"}\n'), "failed")
        body = {"model": BASE, "messages": [{"role": "user", "content": "zanzibar"}], "max_tokens": 400}
        with user.http.stream("POST", CHAT, json={**body, "ignore_eos": True, "stream": True}) as answer:
            identity = answer.headers["x-request-id"]
            lines = answer.iter_lines()
            next(lines)
            ended = ThreadPoolExecutor(1).submit(server.stop, signal.SIGTERM)
            events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        assert ended.result(SECONDS) == -signal.SIGTERM
    logged = [json.loads(line) for line in server.logged.splitlines()]
    assert "zanzibar" not in server.logged
    [access] = [line for line in logged if line["request_id"] == identity and line["logger"] == "adapterhub.access"]
    assert (access["method"], access["route"], access["status"]) == ("POST", CHAT, 200)
    assert {line["route"] for line in logged if line["logger"] == "adapterhub.access"} >= {"/v1/models/{name:path}"}


# -- without keys


def test_a_server_without_keys_is_for_loopback_alone(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.1", "example.com", ""):
        with pytest.raises(BadRequest, match="--no-auth"):
            Config(data_dir=tmp_path, host=host, no_auth=True)
    for host in ("127.0.0.1", "::1", "localhost"):
        assert Config(data_dir=tmp_path, host=host, no_auth=True).no_auth


def test_a_server_without_keys_answers_programs_and_not_pages_from_elsewhere(
    base_directory: Path, tmp_path: Path
) -> None:
    with running(small_config(base_directory, tmp_path, no_auth=True)) as server:
        url = server.url
        assert httpx.get(f"{url}/admin/tiers", timeout=SECONDS).status_code == 200
        answer = httpx.post(f"{url}{CHAT}", json={"model": BASE, "messages": HELLO, "max_tokens": 1}, timeout=SECONDS)
        assert answer.status_code == 200
        for header in ({"host": "evil.example"}, {"host": "127.0.0.1.evil.example:80"}, {"origin": "https://evil.example"},
                       {"origin": "null"}):  # fmt: skip
            refused(httpx.get(f"{url}/admin/tiers", headers=header), 403, "insufficient_permissions", "--no-auth")
            files = {"file": ("a.jsonl", chat_lines())}
            answer = httpx.post(f"{url}/v1/files", data={"purpose": "fine-tune"}, files=files, headers=header)
            refused(answer, 403, "insufficient_permissions", "--no-auth")
        assert httpx.get(f"{url}/v1/models", headers={"origin": "http://localhost:3000"}).status_code == 200
