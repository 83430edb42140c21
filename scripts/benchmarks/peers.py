"""The same load on peers, where they are there: a vLLM server by its URL, PEFT in a process of its own."""

from __future__ import annotations

import json
import secrets
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import httpx
from figure import Figure

from adapterhub.base.embedded import EMBEDDED, base_path
from benchmarks.load import Load
from benchmarks.server import PROMPT, write_peft_directories

PEER_STREAMS = (1, 16)


@dataclass(frozen=True)
class Setting:
    """What a benchmark is run beside, and where its plots go, if anywhere."""

    vllm: str | None
    peft: bool
    plots: Path | None

    def peers_decode(self, tokens: int, rounds: int) -> list[Figure]:
        with tempfile.TemporaryDirectory() as directory:
            paths = write_peft_directories(Path(directory), max(PEER_STREAMS)) if self.vllm or self.peft else []
            figures = _vllm(self.vllm, paths, tokens, rounds) if self.vllm else []
            return figures + (_peft(paths, tokens, rounds) if self.peft else [])


def _vllm(url: str, paths: list[Path], tokens: int, rounds: int) -> list[Figure]:
    with httpx.Client(base_url=url, timeout=600) as client:
        base = client.get("/v1/models").json()["data"][0]["id"]
        run = secrets.token_hex(4)  # a name can be loaded once
        names = {path: f"{run}-{path.name}" for path in paths}
        for path, name in names.items():
            body = {"lora_name": name, "lora_path": str(path)}
            client.post("/v1/load_lora_adapter", json=body).raise_for_status()
    load = Load(url)
    figures = []
    for count in PEER_STREAMS:
        for kind, models in (("base", [base]), ("all different", list(names.values()))):
            done = load.rounds(models, count, tokens, rounds)
            note = f"first token {statistics.median(r.first_ms for r in done):.0f} ms"
            figures.append(Figure.of(f"vLLM: {count} streams, {kind}", "tok/s", [r.rate for r in done], note))
    return figures


def _peft(paths: list[Path], tokens: int, rounds: int) -> list[Figure]:
    order = {
        "base": base_path(EMBEDDED),
        "paths": [str(p) for p in paths],
        "streams": PEER_STREAMS,
        "tokens": tokens,
        "rounds": rounds,
        "prompt": PROMPT,
    }
    command = [sys.executable, str(Path(__file__).with_name("peft_peer.py")), json.dumps(order)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rates = json.loads(printed.splitlines()[-1])
    return [Figure.of(f"PEFT: {n} streams, all different", "tok/s", values) for n, values in rates.items()]
