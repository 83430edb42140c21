"""`adapterhub policy simulate`: which policy, and how much memory, a server's own users would be served best with."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.progress import track
from rich.table import Table

from adapterhub.cli.client import Json, console, print_json, stderr
from adapterhub.cli.pictures import check_png
from adapterhub.config import Config, default_data_dir, format_bytes, parse_bytes
from adapterhub.errors import BadRequest
from adapterhub.swap.policies import Policy, Rules

if TYPE_CHECKING:
    from adapterhub.swap.frames import Trace
    from adapterhub.swap.simulate import Outcome, Result, Setting


class Law(StrEnum):
    ZIPF = "zipf"
    POWER = "power"


_ADAPTERS, _REQUESTS = 1000, 10_000
_SKEWS = {Law.ZIPF: 1.0, Law.POWER: 0.3}
_LEAST_SKEWS = {Law.ZIPF: 0.0, Law.POWER: 0.01}
_RANKS = "8,16,32,64"
_MOST_SKEW = 10.0
_MOST_RANK = 1024
_MOST_GENERATED = 1_000_000

_DEVICE_HELP = "A budget of the device pool, as in 512MiB; repeatable. Default: shares of the bytes of all adapters."
_RAM_HELP = "A budget of the RAM tier, 0 for none; repeatable. Default: a quarter of the bytes of all adapters."
_GENERATE_HELP = "Replay requests that nobody made: who is asked for follows this law."
_SKEW_HELP = "Zipf's exponent (default 1.0: more is more skewed), or the power law's (0.3: less is more skewed)."


def simulate(
    data_dir: Annotated[
        Path | None,
        typer.Option(help="The server's data directory, whose trace is replayed; the server may be running."),
    ] = None,
    generate: Annotated[Law | None, typer.Option(help=_GENERATE_HELP)] = None,
    adapters: Annotated[
        int | None, typer.Option(min=1, max=_MOST_GENERATED, help=f"How many to generate; default {_ADAPTERS}.")
    ] = None,
    requests: Annotated[
        int | None, typer.Option(min=1, max=_MOST_GENERATED, help=f"How many to generate; default {_REQUESTS}.")
    ] = None,
    skew: Annotated[float | None, typer.Option(help=_SKEW_HELP)] = None,
    ranks: Annotated[
        str | None, typer.Option(help=f"Of the generated adapters, taken in turn; default {_RANKS}.")
    ] = None,
    device_bytes: Annotated[list[str] | None, typer.Option(help=_DEVICE_HELP)] = None,
    ram_bytes: Annotated[list[str] | None, typer.Option(help=_RAM_HELP)] = None,
    policy: Annotated[list[Policy] | None, typer.Option(help="A policy; repeatable. Default: all.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw hit ratio and cold boots over the budget, as a PNG.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Replay a trace under each policy and budget: hits, cold boots, bytes read. Changes nothing.

    A server's own trace is replayed with its times to live and owners' rules, as if on one device; pins play no part.
    """
    from adapterhub.swap.simulate import Budgets, Setting, sweep

    if plot is not None:
        check_png(plot, "--plot")
    if generate is not None:
        if data_dir is not None:
            raise BadRequest("Give --data-dir or --generate, not both.")
        trace = _generated(generate, adapters, requests, skew, ranks)
        rules = Rules()
    else:
        for name, value in (("adapters", adapters), ("requests", requests), ("skew", skew), ("ranks", ranks)):
            if value is not None:
                raise BadRequest(f"--{name} is for traces that are generated: give --generate too.")
        config = Config(data_dir=(data_dir or default_data_dir()).expanduser())
        trace, rules = _recorded(config.trace_dir), _rules_of(config.database)
    pairs = itertools.product(*_budgets(trace, device_bytes, ram_bytes))
    policies = list(dict.fromkeys(policy or Policy))
    settings = [Setting(Budgets(*pair), chosen, rules) for pair in pairs for chosen in policies]
    runs = sweep(trace, settings)
    hidden = as_json or not stderr.is_terminal
    results = list(track(runs, "Replaying", len(settings), console=stderr, transient=True, disable=hidden))
    if as_json:
        print_json(_json(trace, results))
    else:
        _show(trace, results)
    if plot is not None:
        _draw(results, plot)
        if not as_json:
            console.print(f"Wrote {plot}.", soft_wrap=True)


def _recorded(directory: Path) -> Trace:
    from adapterhub.swap.frames import read_trace

    if not directory.parent.is_dir():
        raise BadRequest(f"There is no directory {directory.parent}. Give the --data-dir of a server, or --generate.")
    trace = read_trace(directory)
    if not len(trace):
        raise BadRequest(
            f"{directory} holds no trace: no server there has answered a request with an adapter yet. Give another "
            "--data-dir, or --generate."
        )
    return trace


def _rules_of(database: Path) -> Rules:
    """What the operator has set on the server; the policies of which are those that are compared."""
    from adapterhub.swap.database import Database
    from adapterhub.swap.settings import Settings

    if not database.exists():
        return Rules()
    opened = Database(database)
    try:
        return Settings(opened).rules()
    finally:
        opened.close()


def _generated(law: Law, adapters: int | None, requests: int | None, skew: float | None, ranks: str | None) -> Trace:
    from adapterhub.swap.generate import Shape, generate

    skew = _SKEWS[law] if skew is None else skew
    least = _LEAST_SKEWS[law]
    if not least <= skew <= _MOST_SKEW:  # nan is not
        raise BadRequest(f"--skew of {law} is from {least:g} to {_MOST_SKEW:g}, not {skew:g}.")
    return generate(Shape(law), adapters or _ADAPTERS, requests or _REQUESTS, skew, _parse_ranks(ranks or _RANKS))


def _parse_ranks(text: str) -> list[int]:
    try:
        ranks = [int(part) for part in text.split(",")]
    except ValueError:
        ranks = [0]
    if not all(1 <= rank <= _MOST_RANK for rank in ranks):
        raise BadRequest(f"--ranks {text!r} are not ranks from 1 to {_MOST_RANK}. Write them as in {_RANKS}.")
    return ranks


def _budgets(trace: Trace, device: Sequence[str] | None, ram: Sequence[str] | None) -> tuple[list[int], list[int]]:
    """Of the device and of RAM, in bytes, each once."""
    from adapterhub.swap.simulate import DEVICE_SHARES, RAM_SHARE, share_budgets

    devices = list(dict.fromkeys(map(parse_bytes, device))) if device else share_budgets(trace, DEVICE_SHARES)
    rams = list(dict.fromkeys(map(parse_bytes, ram))) if ram else share_budgets(trace, [RAM_SHARE])
    return devices, rams


def _json(trace: Trace, results: Sequence[Result]) -> dict[str, Any]:
    from adapterhub.swap.simulate import best, blocks

    chosen, sizes = best(results), blocks(trace)
    return {
        "trace": {
            "uses": len(trace),
            "blocks": len(sizes),
            "bytes": sum(sizes.values()),
            "seconds": float(trace.time[-1] - trace.time[0]),
        },
        "results": [
            {**_fields(setting, outcome), "best": chosen[setting.budgets] == setting} for setting, outcome in results
        ],
    }


def _fields(setting: Setting, outcome: Outcome) -> dict[str, Any]:
    return {
        "policy": setting.policy,
        "device_bytes": setting.budgets.device,
        "ram_bytes": setting.budgets.ram,
        "hits": {"device": outcome.device_hits, "ram": outcome.ram_hits},
        "hit_ratio": outcome.hit_ratio,
        "loads": outcome.loads,
        "cold_boots": outcome.cold_boots,
        "cold_boots_per_1000": outcome.cold_boots_per_1000,
        "read_bytes": outcome.read_bytes,
        "evictions": {"device": outcome.device_evictions, "ram": outcome.ram_evictions},
    }


def _show(trace: Trace, results: Sequence[Result]) -> None:
    from adapterhub.swap.simulate import best, blocks

    chosen, sizes = best(results), blocks(trace)
    first = 1000 * len(sizes) / len(trace)
    table = Table(
        title=f"{len(trace)} uses of {len(sizes)} adapters ({format_bytes(sum(sizes.values()))})",
        caption=f"Cold: read from disk or store; {first:.1f} per 1000 are first uses. * fewest cold for these budgets",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),  # so that 80 columns are enough
    )
    for heading in ("Device", "RAM"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("Policy", no_wrap=True)
    for heading in ("On\ndevice", "In\nRAM", "Cold per\n1000", "Read", "Loads", "Evicted"):
        table.add_column(heading, justify="right", no_wrap=True)
    for setting, outcome in results:
        marked = chosen[setting.budgets] == setting
        table.add_row(
            format_bytes(setting.budgets.device),
            format_bytes(setting.budgets.ram),
            f"{setting.policy} *" if marked else setting.policy,
            f"{outcome.hit_ratio:.1%}",
            f"{outcome.ram_hits / outcome.uses:.1%}",
            f"{outcome.cold_boots_per_1000:.1f}",
            format_bytes(outcome.read_bytes),
            str(outcome.loads),
            str(outcome.device_evictions),
            style="bold green" if marked else "",
            end_section=setting.policy is results[-1].setting.policy,
        )
    console.print(table)


def _draw(results: Sequence[Result], path: Path) -> None:
    """A row for each budget of RAM, hit ratio beside cold boots, one curve per policy over the device's budget; with
    one budget of the device alone, rows and curves change places."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from adapterhub.config import MIB

    devices = {result.setting.budgets.device for result in results}
    along, row_of = ("device", "ram") if len(devices) > 1 else ("ram", "device")
    rows = list(dict.fromkeys(getattr(result.setting.budgets, row_of) for result in results))
    figure = Figure(figsize=(10, 3.6 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), 2, squeeze=False)
    for row, held in zip(axes, rows, strict=True):
        for policy in dict.fromkeys(result.setting.policy for result in results):
            curve = [r for r in results if r.setting.policy is policy and getattr(r.setting.budgets, row_of) == held]
            curve.sort(key=lambda r: getattr(r.setting.budgets, along))
            budgets = [getattr(r.setting.budgets, along) / MIB for r in curve]
            row[0].plot(budgets, [r.outcome.hit_ratio for r in curve], "o-", label=policy)
            row[1].plot(budgets, [r.outcome.cold_boots_per_1000 for r in curve], "o-", label=policy)
        other = {"device": "the device", "ram": "RAM"}
        row[0].set(ylabel="hit ratio of the device", title=f"{format_bytes(held)} of {other[row_of]}")
        row[1].set(ylabel="cold boots per 1000 requests")
        for plot in row:
            plot.set_xlabel(f"budget of {other[along]} (MiB)")
            plot.set_ylim(bottom=0)
            plot.grid(alpha=0.3)
        row[0].legend()
    figure.savefig(path, dpi=120)
