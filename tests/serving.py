"""Real servers on loopback over a tiny random Llama that speaks the embedded base's tokens: one in this process, shared
by all tests, and ones in processes of their own, which can be killed."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import pytest
import torch
from openai.types import CompletionUsage
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

from adapterhub.api.app import create_app
from adapterhub.api.connection import Connection
from adapterhub.api.gate import Gate
from adapterhub.api.hub import Hub
from adapterhub.api.server import Server as HttpServer
from adapterhub.api.server import listen
from adapterhub.api.tenancy.keys import KeyStore
from adapterhub.base.embedded import EMBEDDED, base_path
from adapterhub.base.model import load_bases
from adapterhub.config import MIB, Config
from adapterhub.swap.database import Database
from tests.tiny import peft_model, saved, tiny_model

BASE = "tiny"  # the name the tiny base is served under
CONTEXT = 512
MAX_FILE = 6 * MIB
SECONDS = 180  # how long a test waits for anything: other processes may have the machine
COMMAND = Path(sys.executable).with_name("adapterhub")
Found = TypeVar("Found")
_owners = itertools.count(1)


def eventually(look: Callable[[], Found], *, seconds: float = SECONDS) -> Found:
    """What `look` finds as soon as that is true; fails when it never is."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"nothing after {seconds} s"
        time.sleep(0.02)
    return found


def counted(usage: CompletionUsage | None) -> tuple[int, int, int]:
    """The tokens of prompt, answer and both; what is asked again has as many, but may find more of them cached."""
    assert usage is not None
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


# -- the base and adapters for it


def save_base(directory: Path, *, seed: int = 0, context: int = CONTEXT) -> Path:
    """A transformers directory that `serve --base` loads: random, but it knows text, chat and the end of a turn."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    model = tiny_model(config, seed=seed)
    with torch.no_grad():
        model.lm_head.weight *= 20  # so that it can be sure of something, once it has learned it
    model.generation_config.eos_token_id = 2
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(base_path(EMBEDDED)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def base_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("bases") / BASE)


@pytest.fixture(scope="session")
def base_model(base_directory: Path) -> PreTrainedModel:
    """The base as transformers runs it: the oracle. No test changes it."""
    return AutoModelForCausalLM.from_pretrained(base_directory, dtype=torch.float32, attn_implementation="eager").eval()


class PeftFiles:
    """What PEFT saves of a random adapter, and PEFT's own model with it."""

    def __init__(self, model: PreTrainedModel, directory: Path, **config: Any) -> None:
        self.model = peft_model(model, **config)
        self.directory = directory
        self.config, self.weights = saved(self.model, directory)

    @property
    def upload(self) -> dict[str, tuple[str, bytes]]:
        """The files of a multipart import."""
        return {
            "config": ("adapter_config.json", self.config),
            "weights": ("adapter_model.safetensors", self.weights),
        }


@pytest.fixture(scope="session")
def adapter(base_model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> PeftFiles:
    return PeftFiles(base_model, tmp_path_factory.mktemp("peft") / "one", seed=1)


@pytest.fixture(scope="session")
def other_adapter(base_model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> PeftFiles:
    return PeftFiles(base_model, tmp_path_factory.mktemp("peft") / "two", seed=2, r=3)


# -- who asks


class User:
    """An owner with a key: through OpenAI's SDK, and through plain HTTP where that has no word for it."""

    def __init__(self, url: str, owner: str, key: str) -> None:
        self.owner, self.key, self.url = owner, key, url
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=SECONDS)
        self.http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=SECONDS)

    def close(self) -> None:
        self.openai.close()
        self.http.close()

    def upload(self, content: bytes, *, name: str = "data.jsonl", purpose: str = "fine-tune") -> str:
        return self.openai.files.create(file=(name, content), purpose=purpose).id  # type: ignore[arg-type]

    def import_adapter(self, files: PeftFiles, name: str) -> dict[str, Any]:
        return self.http.post("/v1/adapters", data={"name": name}, files=files.upload).raise_for_status().json()

    def train(self, content: bytes, *, suffix: str | None = None, model: str = BASE, **hyperparameters: Any) -> str:
        """Uploads and creates a job; returns its id."""
        method: Any = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
        more = {} if suffix is None else {"suffix": suffix}
        job = self.openai.fine_tuning.jobs.create(
            model=model, training_file=self.upload(content), method=method, seed=7, **more
        )
        return job.id

    def job(self, identity: str, *wanted: str, seconds: float = SECONDS) -> Any:
        """The job, once it is in one of the states `wanted`, or has ended."""
        final = ("succeeded", "failed", "cancelled")

        def look() -> Any:
            job = self.openai.fine_tuning.jobs.retrieve(identity)
            return job if job.status in (*wanted, *final) else None

        job = eventually(look, seconds=seconds)
        assert not wanted or job.status in wanted, job
        return job

    def ask(self, model: str, text: str = "Hello there", **options: Any) -> str:
        """A greedy answer in a chat."""
        fields = {"max_tokens": 8, "temperature": 0, **options}
        answer = self.openai.chat.completions.create(
            model=model, messages=[{"role": "user", "content": text}], **fields
        )
        return answer.choices[0].message.content

    def tier(self, model: str) -> str:
        """Where a model's adapter came from, for one more token."""
        body = {"model": model, "prompt": [5, 6, 7], "max_tokens": 1}
        return self.http.post("/v1/completions", json=body).raise_for_status().headers["x-adapterhub-tier"]


def chat_lines(count: int = 12, answer: str = "Aye") -> bytes:
    """A training file of `count` short conversations, from which the tiny base learns to give that answer."""
    line = b'{"messages": [{"role": "user", "content": "Say %d"}, {"role": "assistant", "content": "%s"}]}\n'
    return b"".join(line % (i, answer.encode()) for i in range(count))


# -- a server in this process


class Server:
    """A started server. `user` makes a new owner each time, so that tests do not see one another."""

    def __init__(self, url: str, hub: Hub, gate: Gate) -> None:
        self.url, self.hub, self.gate = url, hub, gate
        self.data_dir = hub.config.data_dir
        self._users: list[User] = []
        self.admin = self.as_user("admin", hub.config.admin_key_file.read_text().strip())

    def user(self, *, owner: str | None = None) -> User:
        owner = owner or f"user-{next(_owners)}"
        return self.as_user(owner, self.hub.keys.create(owner))

    def as_user(self, owner: str, key: str) -> User:
        self._users.append(User(self.url, owner, key))
        return self._users[-1]

    def stored(self) -> set[str]:
        """The files that uploads and adapters lie in, once no job is left that might add one."""
        eventually(lambda: not self.hub.jobs.under_way())
        folders = (self.hub.config.uploads_dir, self.hub.config.blobs_dir)
        return {str(path.relative_to(self.data_dir)) for folder in folders for path in folder.iterdir()}

    def evict(self, adapter: str) -> None:
        self.admin.http.post(f"/admin/adapters/{adapter}/evict").raise_for_status()

    def engine_stats(self) -> dict[str, Any]:
        return self.admin.http.get("/admin/tiers").raise_for_status().json()["engine"]

    def close(self) -> None:
        for user in self._users:
            user.close()


@contextmanager
def running(
    config: Config,
    *,
    change: Callable[[Any], None] = lambda app: None,
    grace: float = 10,
    connection: type[Connection] = Connection,
) -> Iterator[Server]:
    """A real uvicorn on a free port, in a thread. `change` sees the application before it starts; `grace` is how many
    seconds requests have to end when it stops."""
    app = create_app(config, *load_bases(config))
    change(app)
    listener = listen("127.0.0.1", 0)
    server = HttpServer(app, listener, drain_seconds=grace, connection=connection)
    thread = threading.Thread(target=server.serve_forever, name="server")
    thread.start()
    try:
        eventually(lambda: server.started or not thread.is_alive())
        assert server.started, "the server did not start"
        started = Server(f"http://127.0.0.1:{listener.getsockname()[1]}", app.state.hub, app.state.gate)
        try:
            yield started
            if app.state.hub.engine.alive:
                app.state.hub.engine.check_integrity().result(timeout=SECONDS)
        finally:
            started.close()
    finally:
        server.should_exit = True
        thread.join(SECONDS)
    assert not thread.is_alive(), "the server does not end"


def small_config(base_directory: Path, data_dir: Path, **changes: Any) -> Config:
    sizes = {"device_bytes": 8 * MIB, "kv_bytes": 8 * MIB, "max_file_bytes": MAX_FILE}
    return Config(base=str(base_directory), data_dir=data_dir, device="cpu", **{**sizes, **changes})


@pytest.fixture(scope="session")
def server(base_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(small_config(base_directory, tmp_path_factory.mktemp("server"))) as started:
        yield started


@pytest.fixture
def user(server: Server) -> User:
    """An owner nobody else is."""
    return server.user()


# -- a server in a process of its own


class Process:
    """`adapterhub serve` on `data_dir`: `start`, then `stop` or `kill`, and `start` again."""

    def __init__(self, base: Path | str, data_dir: Path, *options: str) -> None:
        self.data_dir = data_dir
        self.log = data_dir.with_name(f"{data_dir.name}.log")
        self.url = ""
        self.command = [str(COMMAND), "serve", "--port", "0", "--device", "cpu", "--data-dir", str(data_dir)]
        self.command += ["--base", str(base), *options]
        self._process: subprocess.Popen[str] | None = None
        self._users: list[User] = []
        self._log_start = 0

    @property
    def logged(self) -> str:
        """What it has said on stderr since it was started last."""
        return self.log.read_text()[self._log_start :]

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> Process:
        """Waits until it serves."""
        with self.log.open("a") as log:
            self._log_start = log.tell()
            options: Any = {"stdout": subprocess.PIPE, "stderr": log, "text": True, "env": environment()}
            self._process = subprocess.Popen(self.command, **options)
        watchdog = threading.Timer(SECONDS, self._process.kill)
        watchdog.start()
        assert self._process.stdout is not None
        said = ""
        for line in self._process.stdout:
            said += line
            if "admin key" in line:
                break
        watchdog.cancel()
        found = re.search(r"http://\S+(?=/v1)", said)
        assert found, f"the server did not start: {said}\n{self.log.read_text()}"
        self.url = found[0]
        return self

    def kill(self) -> None:
        """`kill -9`."""
        self._end(signal.SIGKILL)

    def stop(self, how: signal.Signals = signal.SIGINT) -> int:
        """What Ctrl-C does, or another signal; returns the exit status."""
        return self._end(how)

    def _end(self, how: signal.Signals) -> int:
        assert self._process is not None
        assert self._process.stdout is not None
        self._process.send_signal(how)
        try:
            return self._process.wait(SECONDS)
        finally:
            self._process.stdout.close()
            self._process = None

    def close(self) -> None:
        if self._process is not None:
            self.kill()
        for user in self._users:
            user.close()

    def create_key(self, owner: str, *options: str) -> str:
        """As an operator does it."""
        made = run_cli("keys", "create", owner, *options, "--data-dir", str(self.data_dir))
        assert made.returncode == 0, made.stderr
        return made.stdout.strip()

    def user(self, owner: str, key: str | None = None) -> User:
        """A client for the server as it runs now; with a new key, unless one is given."""
        if key is None:
            database = Database(self.data_dir / "hub.db")
            key = KeyStore(database).create(owner)
            database.close()
        self._users.append(User(self.url, owner, key))
        return self._users[-1]

    def engine_stats(self) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {(self.data_dir / 'admin.key').read_text().strip()}"}
        answer = httpx.get(f"{self.url}/admin/tiers", headers=headers, timeout=SECONDS)
        return answer.raise_for_status().json()["engine"]


@contextmanager
def process(base: Path | str, data_dir: Path, *options: str) -> Iterator[Process]:
    """A server process that is not started yet; ends with the block, however that ends."""
    made = Process(base, data_dir, *options)
    try:
        yield made
    finally:
        with suppress(ProcessLookupError):
            made.close()


def environment(**more: str) -> dict[str, str]:
    """Of a child process: no network, wide and colourless output, and no settings of whoever runs the tests."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("ADAPTERHUB_")}
    return {**kept, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1", **more}


def run_cli(*arguments: str, said: str = "", user: User | None = None) -> subprocess.CompletedProcess[str]:
    """The `adapterhub` command with `said` on its standard input, on behalf of `user`."""
    account = {} if user is None else {"ADAPTERHUB_URL": user.url, "ADAPTERHUB_API_KEY": user.key}
    return subprocess.run(
        [str(COMMAND), *arguments],
        input=said,
        capture_output=True,
        text=True,
        env=environment(**account),
        timeout=SECONDS,
    )
