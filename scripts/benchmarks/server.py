"""A server of the benchmark's own, and random adapters for it."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import save

from adapterhub.base.model import Base, load_base
from adapterhub.config import Config
from adapterhub.swap.layout import Layout

COMMAND = Path(sys.executable).with_name("adapterhub")
PROMPT = "The history of the city of London begins with"
RANK = 16
START_SECONDS = 300


@dataclass
class Server:
    """A running server, and a client with a key for it: the operator's, unless it is another owner's (`owners`)."""

    process: subprocess.Popen[str]
    client: httpx.Client
    key: str
    data: Path
    start_seconds: float
    quantized: bool

    @property
    def url(self) -> str:
        return str(self.client.base_url).rstrip("/")

    @property
    def base(self) -> str:
        return self.client.get("/v1/models").json()["data"][0]["id"]

    def resident_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) / 1024

    def evict(self, adapter: str) -> None:
        """Off the device and out of RAM, by the adapter's id."""
        self.client.post(f"/admin/adapters/{adapter}/evict").raise_for_status()

    def tiers(self) -> dict[str, Any]:
        return self.client.get("/admin/tiers").raise_for_status().json()


@contextmanager
def server(*options: str, prepare: Callable[[Path], None] = lambda data: None) -> Iterator[Server]:
    """A server on fresh data and a free port; ended when the block ends. `prepare` may fill its data directory before
    it starts."""
    data = Path(tempfile.mkdtemp(prefix="adapterhub-bench-"))
    prepare(data)
    started = time.perf_counter()
    command = [str(COMMAND), "serve", "--port", "0", "--data-dir", str(data), *options]
    with (data / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    watchdog = threading.Timer(START_SECONDS, process.kill)
    watchdog.start()
    try:
        url = _announced(process, data / "server.log")
        httpx.get(f"{url}/healthz").raise_for_status()
        seconds = time.perf_counter() - started
        watchdog.cancel()
        key = (data / "admin.key").read_text().strip()
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=600) as client:
            yield Server(process, client, key, data, seconds, "--quantize" in options)
    finally:
        watchdog.cancel()
        process.send_signal(signal.SIGINT)
        process.wait(60)
        assert process.stdout is not None
        process.stdout.close()
        shutil.rmtree(data)


@contextmanager
def owners(running: Server, count: int) -> Iterator[list[Server]]:
    """The server as that many owners see it, each with a key of its own."""
    with ExitStack() as stack:
        seen = []
        for number in range(count):
            made = running.client.post("/admin/keys", json={"owner": f"owner-{number}"}).raise_for_status().json()
            client = httpx.Client(base_url=running.url, headers={"Authorization": f"Bearer {made['key']}"}, timeout=600)
            seen.append(replace(running, client=stack.enter_context(client), key=made["key"]))
        yield seen


def _announced(process: subprocess.Popen[str], log: Path) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"(http://\S+)/v1", line):
            return found[1]
    raise SystemExit(f"the server did not start:\n{log.read_text()}")


@cache
def base() -> Base:
    return load_base(Config(data_dir=Path("unused"), device="cpu"))


def chosen(targets: Sequence[str]) -> Layout:
    """The base's linears of these names; all, with none."""
    return Layout(tuple(t for t in base().layout.targets if not targets or t.name.rpartition(".")[2] in targets))


def peft_files(seed: int, rank: int = RANK, targets: Sequence[str] = ()) -> dict[str, bytes]:
    """A random PEFT adapter on the linears of these names (all, with none), with an effect of its own."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    layout = chosen(targets)
    for target in layout.targets:
        prefix = f"base_model.model.{target.name}"
        a = torch.randn(rank, target.n_in, generator=generator) / target.n_in**0.5
        b = torch.randn(target.n_out, rank, generator=generator) * 0.01
        tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"] = a.bfloat16(), b.bfloat16()
    names = sorted({t.name.rpartition(".")[2] for t in layout.targets})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "target_modules": names}
    return {"config": json.dumps(config).encode(), "weights": save(tensors, metadata={"format": "pt"})}


def import_adapters(
    running: Server, count: int, ranks: Sequence[int] = (RANK,), targets: Sequence[str] = (), begin: int = 0
) -> list[dict[str, Any]]:
    """Random adapters `begin` to `count`, their ranks taken in turn."""
    made = []
    for index in range(begin, count):
        files = peft_files(index, ranks[index % len(ranks)], targets)
        answer = running.client.post("/v1/adapters", data={"name": f"a{index}"}, files=files)
        made.append(answer.raise_for_status().json())
    return made


def write_peft_directories(directory: Path, count: int) -> list[Path]:
    """The same adapters as PEFT directories, for peers."""
    paths = []
    for index in range(count):
        path = directory / str(index)
        path.mkdir(parents=True)
        files = peft_files(index)
        (path / "adapter_config.json").write_bytes(files["config"])
        (path / "adapter_model.safetensors").write_bytes(files["weights"])
        paths.append(path)
    return paths
