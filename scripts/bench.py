"""Measures a server of its own, from outside, over HTTP: start-up, cold boot and memory.

Every figure comes with its spread, and where there is one beside a limit measured in the same run. A shared machine can
be twice as slow from one run to the next: compare only what stands in one report.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save

from adapterhub.base.model import load_base
from adapterhub.config import MIB, Config

COMMAND = Path(sys.executable).with_name("adapterhub")
PROMPT = "The history of the city of London begins with"
RANK = 16
PAIRS = 30
START_SECONDS = 300
console = Console(highlight=False)


@dataclass(frozen=True)
class Figure:
    """Median, minimum and maximum of `runs` measurements; `bound` is what the project asks for, if it does."""

    name: str
    unit: str
    median: float
    low: float
    high: float
    runs: int
    bound: float | None = None

    @classmethod
    def of(cls, name: str, unit: str, values: list[float], bound: float | None = None) -> Figure:
        rounded = [round(x, 2) for x in (statistics.median(values), min(values), max(values))]
        return cls(name, unit, rounded[0], rounded[1], rounded[2], len(values), bound)


@dataclass
class Server:
    """A running server, and a client with its admin key."""

    process: subprocess.Popen[str]
    client: httpx.Client
    start_seconds: float

    def resident_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) / 1024

    def first_token(self, model: str, tier: str) -> float:
        """Milliseconds to the first token of a streamed completion; the adapter must come from `tier`."""
        body = {"model": model, "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "stream": True}
        started = time.perf_counter()
        with self.client.stream("POST", "/v1/completions", json=body) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    seen = answer.headers["x-adapterhub-tier"]
                    if seen != tier:
                        raise SystemExit(f"{model} came from {seen}, not from {tier}")
                    return (time.perf_counter() - started) * 1e3
        raise SystemExit(f"{model} answered nothing")


@contextmanager
def server(*options: str) -> Iterator[Server]:
    """A server on fresh data and a free port; ended when the block ends."""
    data = Path(tempfile.mkdtemp(prefix="adapterhub-bench-"))
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
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=300) as client:
            yield Server(process, client, seconds)
    finally:
        watchdog.cancel()
        process.send_signal(signal.SIGINT)
        process.wait(60)
        shutil.rmtree(data)


def _announced(process: subprocess.Popen[str], log: Path) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"(http://\S+)/v1", line):
            return found[1]
    raise SystemExit(f"the server did not start:\n{log.read_text()}")


def import_adapters(running: Server, count: int) -> list[dict[str, Any]]:
    """`count` random PEFT adapters of rank 16 on all linears, each with an effect of its own."""
    layout = load_base(Config(data_dir=Path("unused"), device="cpu")).layout
    config = json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear"})
    made = []
    for index in range(count):
        torch.manual_seed(index)
        tensors = {}
        for target in layout.targets:
            prefix = f"base_model.model.{target.name}"
            tensors[f"{prefix}.lora_A.weight"] = (torch.randn(RANK, target.n_in) / target.n_in**0.5).bfloat16()
            tensors[f"{prefix}.lora_B.weight"] = (torch.randn(target.n_out, RANK) * 0.01).bfloat16()
        files = {"config": config.encode(), "weights": save(tensors)}
        answer = running.client.post("/v1/adapters", data={"name": f"a{index}"}, files=files)
        made.append(answer.raise_for_status().json())
    return made


def bench_start() -> list[Figure]:
    """From the command to `/healthz` answering, with the base converted already."""
    with server():
        pass  # converts the base, and warms the page cache
    seconds = []
    for _ in range(3):
        with server() as running:
            seconds.append(running.start_seconds)
    return [Figure.of("start to /healthz", "s", seconds, bound=15)]


def bench_coldboot() -> list[Figure]:
    """What an adapter on disk, but not in the pool, adds to the time to first token (file in the page cache)."""
    with server() as running:
        [adapter] = import_adapters(running, 1)
        model, base = adapter["model"], adapter["base"]
        running.first_token(model, "disk")
        cold, warm, plain = [], [], []
        for _ in range(PAIRS):
            plain.append(running.first_token(base, "base"))
            warm.append(running.first_token(model, "device"))
            running.client.post(f"/admin/adapters/{adapter['id']}/evict").raise_for_status()
            cold.append(running.first_token(model, "disk"))
        size = adapter["bytes"]
    return [
        Figure.of("first token, base", "ms", plain),
        Figure.of("first token, adapter on the device", "ms", warm),
        Figure.of("first token, adapter on disk", "ms", cold),
        Figure.of("added by the cold boot", "ms", [c - w for c, w in zip(cold, warm, strict=True)], bound=15),
        Figure.of(f"limit: one read of its {size / MIB:.1f} MiB", "ms", read_times(size)),
    ]


def read_times(size: int) -> list[float]:
    """Milliseconds to read `size` bytes from the page cache into memory that is there already."""
    buffer = bytearray(size)
    times = []
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(bytes(size))
        for _ in range(PAIRS):
            started = time.perf_counter()
            os.preadv(file.fileno(), [buffer], 0)
            times.append((time.perf_counter() - started) * 1e3)
    return times


def bench_memory() -> list[Figure]:
    """Resident set after the start, and with 16 adapters of rank 16 on the device, each used."""
    with server() as running:
        empty = running.resident_mib()
        for adapter in import_adapters(running, 16):
            running.first_token(adapter["model"], "disk")
        on_device = running.client.get("/admin/tiers").json()["tiers"]["device"]["adapters"]
        if on_device != 16:
            raise SystemExit(f"{on_device} adapters are on the device, not 16")
        full = running.resident_mib()
    return [
        Figure.of("resident set, no adapter", "MiB", [empty]),
        Figure.of("resident set, 16 adapters on the device", "MiB", [full], bound=1.2 * 1024),
    ]


BENCHES: dict[str, Callable[[], list[Figure]]] = {
    "start": bench_start,
    "coldboot": bench_coldboot,
    "memory": bench_memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", nargs="*", choices=[*BENCHES, []], help="default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    options = parser.parse_args()
    figures = {name: BENCHES[name]() for name in options.which or BENCHES}
    table = Table("", "median", "min", "max", "unit", "runs", "asked for")
    for name, rows in figures.items():
        table.add_section()
        table.add_row(f"[bold]{name}[/bold]")
        for f in rows:
            bound = "" if f.bound is None else f"at most {f.bound:g}"
            table.add_row(f.name, f"{f.median:g}", f"{f.low:g}", f"{f.high:g}", f.unit, str(f.runs), bound)
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps({n: [asdict(f) for f in rows] for n, rows in figures.items()}, indent=2))


if __name__ == "__main__":
    main()
