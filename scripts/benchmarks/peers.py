"""The same load on peers, where they are: a vLLM server by its URL, PEFT and llama.cpp in processes of their own."""

from __future__ import annotations

import asyncio
import importlib.util
import secrets
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx
from figure import Figure

from adapterhub.base.embedded import EMBEDDED, base_path, find_gguf
from benchmarks.load import Answer, Asked, Load, Round, replay
from benchmarks.process import peer_process
from benchmarks.server import PROMPT, base, write_peft_directories
from benchmarks.turns import SETTLE_SECONDS

NEW_ADAPTERS = 8


class Peer(Protocol):
    """A contender other than AdapterHub, with adapters numbered in the order in which they were loaded."""

    name: str

    def load(self, path: Path) -> float:
        """Loads one more PEFT directory; the seconds it took."""
        ...

    def unload(self) -> None:
        """Takes the last one out again."""
        ...

    def ask(self, adapters: Sequence[int | None], tokens: int, prompt: list[int]) -> Round:
        """One stream for each adapter (None: the base), all at once where the peer can."""
        ...

    def follow(self, adapters: Sequence[int], asked: Sequence[Asked]) -> list[Answer]:
        """A trace: each request for its adapter, when it comes or, where the peer can do one thing at a time, after
        those before it."""
        ...


class Vllm:
    """A vLLM server that may load adapters at run time."""

    name = "vLLM"

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=600)
        self._load = Load(url)
        self._base = self._client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        self._names: list[str] = []

    def load(self, path: Path) -> float:
        name = f"{path.name}-{secrets.token_hex(4)}"  # a name can be loaded once
        started = time.perf_counter()
        body = {"lora_name": name, "lora_path": str(path)}
        self._client.post("/v1/load_lora_adapter", json=body).raise_for_status()
        self._names.append(name)
        return time.perf_counter() - started

    def unload(self) -> None:
        body = {"lora_name": self._names.pop()}
        self._client.post("/v1/unload_lora_adapter", json=body).raise_for_status()

    def ask(self, adapters: Sequence[int | None], tokens: int, prompt: list[int]) -> Round:
        models = [self._base if adapter is None else self._names[adapter] for adapter in adapters]
        return self._load.round(models, tokens, prompt)

    def follow(self, adapters: Sequence[int], asked: Sequence[Asked]) -> list[Answer]:
        return asyncio.run(replay(self._load, [self._names[adapter] for adapter in adapters], asked))

    def close(self) -> None:
        """Leaves the server as it was."""
        while self._names:
            self.unload()
        self._client.close()


@dataclass(frozen=True)
class Setting:
    """What a benchmark is run beside, and where its plots go, if anywhere."""

    vllm: str | None
    peft: bool
    plots: Path | None

    @contextmanager
    def peers(self, adapters: int) -> Iterator[list[Peer]]:
        """Those that are there, with the random adapters 0 to `adapters` loaded."""
        with ExitStack() as stack:
            peers: list[Peer] = []
            if self.vllm:
                server = Vllm(self.vllm)
                stack.callback(server.close)
                peers.append(server)
            if self.peft:
                peers.append(stack.enter_context(peer_process("PEFT", "peft_peer", base_path(EMBEDDED))))
            if importlib.util.find_spec("llama_cpp"):
                peers.append(stack.enter_context(peer_process("llama.cpp", "llama_peer", str(find_gguf()))))
            if peers:
                directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                paths = write_peft_directories(directory, adapters)
                for peer in peers:
                    for path in paths:
                        peer.load(path)
            yield peers

    def peers_coldboot(self) -> list[Figure]:
        """First tokens with adapters that are new to a peer: the time to load one counts."""
        figures = []
        with self.peers(1) as peers, tempfile.TemporaryDirectory() as directory:
            paths = write_peft_directories(Path(directory), NEW_ADAPTERS) if peers else []
            prompt = prompt_ids()
            for peer in peers:
                time.sleep(SETTLE_SECONDS)
                peer.ask([0], 1, prompt)
                loads, colds, warms = [], [], []
                for path in paths:
                    loads.append(peer.load(path) * 1e3)
                    colds.append(peer.ask([1], 1, prompt).first_ms)
                    warms.append(peer.ask([1], 1, prompt).first_ms)
                    peer.unload()
                both = [load + cold for load, cold in zip(loads, colds, strict=True)]
                figures.append(Figure.of(f"{peer.name}: first token, adapter loaded before", "ms", warms))
                note = f"of it {Figure.of('', '', loads).median:g} to load it"
                figures.append(Figure.of(f"{peer.name}: first token, new adapter", "ms", both, note))
        return figures


def prompt_ids() -> list[int]:
    """PROMPT as every contender gets it."""
    ids: list[int] = base().tokenizer.encode(PROMPT)
    return ids
