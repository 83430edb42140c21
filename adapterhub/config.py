"""The one configuration of a server: frozen, every default in one place; the CLI reads its defaults from here."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path

from adapterhub.errors import BadRequest

MIB = 1024**2
DISK_BYTES = 64 * 1024 * MIB  # of block files, where nothing else is said
_UNITS = {"": 1, "K": 1024, "M": MIB, "G": 1024**3, "T": 1024**4}


def parse_bytes(text: str) -> int:
    """`"512MiB"`, `"2G"`, `"1048576"` as a number of bytes (binary units)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, flags=re.IGNORECASE)
    if match is None:
        raise BadRequest(f"{text!r} is not a size. Write a number with an optional unit, as in 512MiB or 2GiB.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def format_bytes(count: int) -> str:
    """1536 -> "1.5 KiB"."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def parse_devices(text: str) -> tuple[str, ...]:
    """`"0,1"`, `"cuda:0,cuda:1"` or `"cpu,cpu"` as devices, of one kind. Raises BadRequest."""
    devices = tuple(f"cuda:{name}" if name.isdecimal() else name for name in map(str.strip, text.split(",")))
    for name in devices:
        if not re.fullmatch(r"cpu|cuda:\d+", name):
            raise BadRequest(
                f"--devices {text!r}: {name!r} is not a device. Give the numbers of CUDA devices, as in 0,1, or cpu "
                "once for each engine, as in cpu,cpu; for a device that is chosen for you, --device auto."
            )
    if "cpu" in devices and devices != ("cpu",) * len(devices):
        raise BadRequest(f"--devices {text!r} mixes cpu and CUDA devices. Give either those or cpu alone.")
    if devices[0] != "cpu" and len(set(devices)) < len(devices):
        raise BadRequest(f"--devices {text!r} names a device twice. Give each once: it has one engine.")
    return devices


def cache_dir() -> Path:
    """Where converted bases are kept: `$XDG_CACHE_HOME/adapterhub`, by default `~/.cache/adapterhub`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adapterhub"


def default_data_dir() -> Path:
    """Where a server keeps its users' data: `$XDG_DATA_HOME/adapterhub`, by default `~/.local/share/adapterhub`."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "adapterhub"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that address; names are looked up by nobody, so only localhost is known."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True, kw_only=True)
class Config:
    """What a server is started with. Sizes are bytes; a size of None is chosen when the device is known. Those of the
    device, RAM and the KV cache are each device's.

    Raises BadRequest for `no_auth` on an address that others can reach.
    """

    data_dir: Path
    base: str = "smollm2-135m-instruct"
    base_name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    device: str = "auto"
    devices: tuple[str, ...] = ()  # several, each with an engine and a copy of the base; none: `device` alone
    dtype: str = "auto"
    quantize: str | None = None  # int8 or int4: the base's weights; adapters stay in 16 bits

    device_bytes: int | None = None  # the pool; None: 512 MiB on a CPU, a third of what computing leaves on a GPU
    ram_bytes: int | None = None  # the host tier; None: 0 on a CPU, whose pool is RAM already; up to 2 GiB with a GPU
    disk_bytes: int | None = None  # block files; None: 64 GiB
    store: str | None = None  # an fsspec URL: blocks are kept there, and the disk is a cache
    kv_bytes: int | None = None  # the KV cache; None: 256 MiB on a CPU, two thirds of what computing leaves on a GPU
    max_file_bytes: int = 512 * MIB  # one upload

    max_batch: int = 32  # sequences that run at once
    max_step_tokens: int = 256  # tokens of one forward: decode rows first, prompt chunks with what is left
    train_micro_tokens: int = 1024  # most tokens of one training micro-step: bounds its memory; its time is measured
    train_latency_slo: float = 1.3  # token latency's 95th percentile while training, over what it is without
    train_jobs: int = 8  # that train at once
    owner_jobs: int = 4  # of them, those of one owner
    owner_queue: int = 32  # of one owner that have not ended, paused ones included
    # the quotas of an owner for whom nothing else is set; None: no limit
    owner_adapters: int | None = None
    owner_bytes: int | None = None  # of files and versions together
    owner_requests_per_minute: int | None = None
    owner_tokens_per_minute: int | None = None  # prompts and answers
    load_threads: int = 2  # block files read at once
    max_waiting: int = 1024  # requests beyond those that run; one more comes back later, unless its owner has few
    request_seconds: float = 600.0  # from a request's arrival to its last token
    body_seconds: float = 30.0  # that a body may take, besides a second for each 4 KiB of it
    drain_seconds: float = 20.0  # for answers that are under way when the server is told to stop
    metrics_port: int | None = None  # of the loopback address, where metrics are read without a key
    no_auth: bool = False  # whoever comes is the operator: for servers that this machine alone can reach

    def __post_init__(self) -> None:
        if self.no_auth and not is_loopback(self.host):
            raise BadRequest(
                f"--no-auth lets in whoever can reach {self.host}. It goes with --host 127.0.0.1 alone; elsewhere, "
                "make keys (`adapterhub keys create OWNER`)."
            )

    @property
    def database(self) -> Path:
        return self.data_dir / "hub.db"

    @property
    def blobs_dir(self) -> Path:
        return self.data_dir / "blobs"

    @property
    def uploads_dir(self) -> Path:
        return self.data_dir / "uploads"

    @property
    def parts_dir(self) -> Path:
        return self.data_dir / "parts"

    @property
    def jobs_dir(self) -> Path:
        return self.data_dir / "jobs"

    @property
    def trace_dir(self) -> Path:
        return self.data_dir / "trace"

    @property
    def admin_key_file(self) -> Path:
        return self.data_dir / "admin.key"
