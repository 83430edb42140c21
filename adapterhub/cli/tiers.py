"""`adapterhub tiers`: budgets and use of device, RAM, disk and store, shown and set; and each device's own numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import typer
from rich.table import Table

from adapterhub.cli.client import DEFAULT_URL, Client, Json, Key, Url, console, print_json, table_of
from adapterhub.cli.devices import devices_table, shortage
from adapterhub.cli.formats import milliseconds, percent
from adapterhub.config import format_bytes, parse_bytes
from adapterhub.errors import BadRequest

app = typer.Typer()
T = TypeVar("T")


@app.callback(invoke_without_command=True)
def show_tiers(context: typer.Context, as_json: Json = False, url: Url = DEFAULT_URL, key: Key = "") -> None:
    """Show budgets, use, hits and load times of each tier, and what runs on each device; `set` changes the budgets.
    Needs an admin key."""
    if context.invoked_subcommand is None:
        _show(Client(url, key).get("/admin/tiers"), as_json)


@app.command("set")
def set_budgets(
    context: typer.Context,
    device: Annotated[str | None, typer.Option(help="Budget of each device's pool, as in 512MiB.")] = None,
    ram: Annotated[str | None, typer.Option(help="Budget of each device's host RAM tier; 0 for none.")] = None,
    disk: Annotated[str | None, typer.Option(help="Budget of the block files on disk.")] = None,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Change budgets while requests run, and for the next start. What no longer fits leaves that tier.

    Another device pool is filled beside the one that it replaces: for a moment what stays in it takes memory twice, and
    on a GPU both pools whole. Where there is no memory for that, nothing is changed."""
    given = {"device_bytes": device, "ram_bytes": ram, "disk_bytes": disk}
    sizes = {name: parse_bytes(size) for name, size in given.items() if size is not None}
    if not sizes:
        raise BadRequest("Give at least one of --device, --ram and --disk.")
    account = Client(_given(context, "url", url), _given(context, "key", key))
    _show(account.patch("/admin/tiers", sizes), _given(context, "as_json", as_json))


def _given(context: typer.Context, name: str, value: T) -> T:
    """An option that may stand before `set` as well as after it."""
    source = context.get_parameter_source(name)
    after = source is not None and source.name == "COMMANDLINE"
    return value if after or context.parent is None else context.parent.params[name]


def _show(answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(answer)
        return
    tiers = answer["tiers"]
    console.print(tiers_table(tiers))
    device = tiers["device"]
    console.print(
        f"Free on the device: {format_bytes(device['budget_bytes'] - device['used_bytes'])}, of which "
        f"{format_bytes(device['largest_free_bytes'])} in one piece (fragmentation "
        f"{percent(device['fragmentation'])}). Moved together so far: {format_bytes(device['moved_bytes'])}."
    )
    if swap_ins := [_swap_in(source, times) for source, times in device["load_ms"].items() if times is not None]:
        console.print(f"From when an adapter was asked for until it was on the device: {'; '.join(swap_ins)}.")
    if "store" in tiers:
        console.print(f"The store is {tiers['store']['url']}.", soft_wrap=True, markup=False)
    console.print(devices_table(answer["devices"]))
    if (line := shortage(answer["engine"])) is not None:
        console.print(line)


def _swap_in(source: str, times: Mapping[str, float]) -> str:
    name = {"ram": "RAM", "remote": "the store"}.get(source, source)
    return f"from {name} p50 {milliseconds(times['p50'])}, p99 {milliseconds(times['p99'])}"


def tiers_table(tiers: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each tier, as the server tells of them."""
    columns = {
        "Tier": "tier",
        "Budget": "budget",
        "Used": "used",
        "Adapters": "adapters",
        "Pinned": "pinned",
        "Hits": "hits",
        "Hit ratio": "hit_ratio",
        "Loads": "loads",
        "Read p50": "p50",
        "Read p99": "p99",
        "Evictions": "evictions",
    }
    rows = [{**tier, "tier": name, **_formatted(name, tier)} for name, tier in tiers.items()]
    return table_of(rows, columns, right=[heading for heading in columns if heading != "Tier"])


def _formatted(name: str, tier: Mapping[str, Any]) -> dict[str, str]:
    """What a reader wants otherwise than the server says it. A store has no budget, and nothing is read from a
    device."""
    found = {}
    if "budget_bytes" in tier:
        used, budget = tier["used_bytes"], tier["budget_bytes"]
        share = f" ({percent(used / budget)})" if budget else ""
        found = {"budget": format_bytes(budget), "used": f"{format_bytes(used)}{share}"}
        found["hit_ratio"] = percent(tier["hit_ratio"])
    if name != "device":
        times = tier["load_ms"] or {"p50": None, "p99": None}
        found |= {share: milliseconds(times[share]) for share in ("p50", "p99")}
    return found
