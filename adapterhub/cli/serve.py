"""`adapterhub serve`: loads the base, says what it serves where, and serves."""

from __future__ import annotations

import gc
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from adapterhub.api.logs import LogFormat, set_up_logs
from adapterhub.config import Config, default_data_dir, format_bytes, is_loopback, parse_bytes, parse_devices
from adapterhub.errors import BadRequest


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
    devices: Annotated[
        str | None,
        typer.Option(help="Several devices instead, as in 0,1: the base is on each, and requests are spread."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), bfloat16, float16 or float32.")] = Config.dtype,
    quantize: Annotated[str | None, typer.Option(help="int8 or int4: keep the base's weights in fewer bits.")] = None,
    device_bytes: Annotated[
        str | None, typer.Option(help="Budget of each device's pool, as in 512MiB; by default the one set last.")
    ] = None,
    ram_bytes: Annotated[
        str | None, typer.Option(help="Budget of each device's host RAM tier; by default the one set last.")
    ] = None,
    disk_bytes: Annotated[
        str | None, typer.Option(help="Budget of the block files on disk; by default the one set last.")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(help="Keep adapters in this object store, as in s3://BUCKET/PREFIX; the disk caches them."),
    ] = None,
    kv_bytes: Annotated[str | None, typer.Option(help="Budget of each device's KV cache.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Sequences that run at once on a device.")] = Config.max_batch,
    train_latency_slo: Annotated[
        float, typer.Option(min=1, help="How much longer than without it tokens may take while jobs train: p95, times.")
    ] = Config.train_latency_slo,
    train_jobs: Annotated[int, typer.Option(min=1, help="Jobs that train at once.")] = Config.train_jobs,
    owner_jobs: Annotated[int, typer.Option(min=1, help="Of them, those of one owner.")] = Config.owner_jobs,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="How long answers have to end when the server is told to stop.")
    ] = Config.drain_seconds,
    log_format: Annotated[
        LogFormat, typer.Option(help="text, or json: one object a line, also one for each request.")
    ] = LogFormat.TEXT,
    metrics_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Answer /metrics without a key on this port of 127.0.0.1.")
    ] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Ask for no keys. Only on a loopback address: who comes is the operator.")
    ] = False,
) -> None:
    """Serve a base and everybody's adapters over an OpenAI-compatible API."""
    if devices is not None and device != Config.device:
        raise BadRequest("Give --device for one device or --devices for several, not both.")
    options: dict[str, Any] = {
        "base": base,
        "base_name": base_name,
        "data_dir": data_dir.expanduser().resolve(),
        "host": host,
        "port": port,
        "device": device,
        "devices": () if devices is None else parse_devices(devices),
        "dtype": dtype,
        "quantize": quantize,
        "max_batch": max_batch,
        "train_latency_slo": train_latency_slo,
        "train_jobs": train_jobs,
        "owner_jobs": owner_jobs,
        "store": store,
        "device_bytes": _size(device_bytes),
        "ram_bytes": _size(ram_bytes),
        "disk_bytes": _size(disk_bytes),
        "kv_bytes": _size(kv_bytes),
        "drain_seconds": drain_seconds,
        "metrics_port": metrics_port,
        "no_auth": no_auth,
    }
    config = Config(**options)
    set_up_logs(log_format)
    _run(config)


def _run(config: Config) -> None:
    import torch

    from adapterhub.api.app import create_app
    from adapterhub.api.server import Server, listen
    from adapterhub.base.model import load_bases
    from adapterhub.swap.cgroup import usable_cores

    listener = listen(config.host, config.port)  # before the base is loaded, so that a busy port shows at once
    console = Console(highlight=False)
    console.print(f"Loading {config.base} ...")
    cores = min(torch.get_num_threads(), usable_cores())  # of itself torch knows nothing of a container's share
    torch.set_num_threads(cores)
    app = create_app(config, *load_bases(config))

    def announce() -> None:
        # what is there now stays for good: without it among what the collector looks through, a full collection takes
        # a few milliseconds instead of 200, for which all tokens would wait
        gc.collect()
        gc.freeze()
        _announce(console, app, config, listener.getsockname()[1], cores)

    server = Server(app, listener, drain_seconds=config.drain_seconds, on_started=announce)
    with suppress(KeyboardInterrupt):  # uvicorn raises it again once it has shut down
        server.serve_forever()


def _announce(console: Console, app: Any, config: Config, port: int, cores: int) -> None:
    hub = app.state.hub
    budgets = hub.engine.budgets
    names = hub.engine.names
    used = f" ({cores} cores)" if hub.base.device.type == "cpu" else ""
    host = f"[{config.host}]" if ":" in config.host else config.host
    table = Table.grid(padding=(0, 2))
    for name, value in (
        ("AdapterHub", f"http://{host}:{port}/v1"),
        ("base", f"{hub.base.name} ({format_bytes(hub.base.nbytes)}, fingerprint {hub.base.fingerprint[:12]})"),
        ("device" if len(names) == 1 else "devices", ", ".join(names) + used),
        (
            "budgets",
            f"device {format_bytes(budgets.device)}, RAM {format_bytes(budgets.ram)}, disk "
            f"{format_bytes(hub.disk.files.budget)}, KV {format_bytes(budgets.kv)} ({hub.engine.kv_tokens} tokens)"
            + (", each device's but for the disk's; tokens on all" if len(names) > 1 else ""),
        ),
        ("data", str(config.data_dir)),
        *([("store", config.store)] if config.store else []),
        ("admin key", str(config.admin_key_file)),
    ):
        table.add_row(f"[bold]{name}[/bold]", str(value))
    console.print(table)
    if not is_loopback(config.host):
        console.print("[yellow]Listening beyond this machine, without TLS: put a TLS proxy in front.[/yellow]")
    if config.no_auth:
        console.print("[yellow]Without keys: every program on this machine is the operator.[/yellow]")
