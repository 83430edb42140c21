"""`adapterhub serve`: loads the base, says what it serves where, and serves."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from adapterhub.config import Config, default_data_dir, format_bytes, parse_bytes
from adapterhub.errors import BadRequest

_GRACE_SECONDS = 5  # for answers that are under way when the server is told to stop


def _size(text: str | None) -> int | None:
    return None if text is None else parse_bytes(text)


def serve(
    base: Annotated[
        str, typer.Option(help="The embedded base, a transformers directory, or a hub name.")
    ] = Config.base,
    base_name: Annotated[str | None, typer.Option(help="The name the base is served under.")] = None,
    data_dir: Annotated[Path, typer.Option(help="Where uploads, adapters and the database are kept.")] = (
        default_data_dir()  # noqa: B008
    ),
    host: Annotated[str, typer.Option(help="The address to listen on.")] = Config.host,
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 for any free one.")] = Config.port,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:N.")] = Config.device,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), bfloat16, float16 or float32.")] = Config.dtype,
    quantize: Annotated[str | None, typer.Option(help="int8 or int4: keep the base's weights in fewer bits.")] = None,
    device_bytes: Annotated[
        str | None, typer.Option(help="Budget of the device pool, as in 512MiB; by default the one set last.")
    ] = None,
    ram_bytes: Annotated[
        str | None, typer.Option(help="Budget of the host RAM tier; by default the one set last.")
    ] = None,
    disk_bytes: Annotated[
        str | None, typer.Option(help="Budget of the block files on disk; by default the one set last.")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(help="Keep adapters in this object store, as in s3://BUCKET/PREFIX; the disk caches them."),
    ] = None,
    kv_bytes: Annotated[str | None, typer.Option(help="Budget of the KV cache.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Sequences that run at once.")] = Config.max_batch,
    train_latency_slo: Annotated[
        float, typer.Option(min=1, help="How much longer than without it tokens may take while jobs train: p95, times.")
    ] = Config.train_latency_slo,
) -> None:
    """Serve a base and everybody's adapters over an OpenAI-compatible API."""
    options: dict[str, Any] = {
        "base": base,
        "base_name": base_name,
        "data_dir": data_dir.expanduser().resolve(),
        "host": host,
        "port": port,
        "device": device,
        "dtype": dtype,
        "quantize": quantize,
        "max_batch": max_batch,
        "train_latency_slo": train_latency_slo,
        "store": store,
        "device_bytes": _size(device_bytes),
        "ram_bytes": _size(ram_bytes),
        "disk_bytes": _size(disk_bytes),
        "kv_bytes": _size(kv_bytes),
    }
    config = Config(**options)
    listener = _bind(config.host, config.port)  # before the base is loaded, so that a busy port shows at once
    _run(config, listener)


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only for sockets that say TCP; with it on, a stream's chunks wait 40 ms
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise BadRequest(
            f"Cannot listen on {host}:{port}: {error.strerror}. Choose another --port or --host."
        ) from error
    return listener


def _run(config: Config, listener: socket.socket) -> None:
    import uvicorn

    from adapterhub.api.app import create_app
    from adapterhub.base.model import load_base

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for noisy in ("httpx", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    console = Console(highlight=False)
    console.print(f"Loading {config.base} ...")
    app = create_app(config, load_base(config))

    class Server(uvicorn.Server):
        """Opens and closes the application itself, so that what keeps it from starting ends where all errors do."""

        application = AsyncExitStack()

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await self.application.enter_async_context(app.router.lifespan_context(app))
            await super().startup(sockets)
            if self.started:
                _announce(console, app, config, listener.getsockname()[1])

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            await super().shutdown(sockets)
            await self.application.aclose()

    settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_GRACE_SECONDS, lifespan="off")
    with suppress(KeyboardInterrupt):  # uvicorn raises it again once it has shut down
        Server(settings).run(sockets=[listener])


def _announce(console: Console, app: Any, config: Config, port: int) -> None:
    hub = app.state.hub
    budgets = hub.engine.budgets
    host = f"[{config.host}]" if ":" in config.host else config.host
    table = Table.grid(padding=(0, 2))
    for name, value in (
        ("AdapterHub", f"http://{host}:{port}/v1"),
        ("base", f"{hub.base.name} ({format_bytes(hub.base.nbytes)}, fingerprint {hub.base.fingerprint[:12]})"),
        ("device", f"{hub.base.device} ({os.cpu_count()} cores)" if hub.base.device.type == "cpu" else hub.base.device),
        (
            "budgets",
            f"device {format_bytes(budgets.device)}, RAM {format_bytes(budgets.ram)}, disk "
            f"{format_bytes(hub.disk.files.budget)}, KV {format_bytes(budgets.kv)} ({hub.engine.kv.capacity} tokens)",
        ),
        ("data", str(config.data_dir)),
        *([("store", config.store)] if config.store else []),
        ("admin key", str(config.admin_key_file)),
    ):
        table.add_row(f"[bold]{name}[/bold]", str(value))
    console.print(table)
    if not _is_loopback(config.host):
        console.print("[yellow]Listening beyond this machine, without TLS: put a TLS proxy in front.[/yellow]")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
