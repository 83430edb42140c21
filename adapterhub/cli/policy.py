"""`adapterhub policy`: the rules by which adapters leave a tier, shown, tried, set and simulated."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

import typer

from adapterhub.cli.choices import Priority
from adapterhub.cli.client import DEFAULT_URL, Client, Json, Key, Url, console, print_json, show
from adapterhub.cli.formats import duration, parse_duration
from adapterhub.cli.simulate import simulate
from adapterhub.config import format_bytes, parse_bytes
from adapterhub.errors import BadRequest
from adapterhub.swap.policies import Policy

app = typer.Typer(help="The rules by which adapters leave a tier. Needs an admin key.", no_args_is_help=True)
_NONE = "none"


class Where(StrEnum):
    DEVICE = "device"
    RAM = "ram"
    DISK = "disk"


_PRIORITIES = list(Priority)  # as the server counts them


@app.command("show")
def show_policy(as_json: Json = False, url: Url = DEFAULT_URL, key: Key = "") -> None:
    """Show the rules of each tier. Needs an admin key."""
    _show_rules(Client(url, key).get("/admin/policy"), as_json)


@app.command("set")
def set_policy(
    tier: Annotated[
        list[Where] | None, typer.Option(help="Whose rules; repeatable. Default: the device's and RAM's.")
    ] = None,
    policy: Annotated[Policy | None, typer.Option(help="What goes first when room is needed.")] = None,
    ttl: Annotated[
        str | None, typer.Option(help="What was not used for so long goes, as in 90s, 1.5h or 7d; none for never.")
    ] = None,
    owner: Annotated[str | None, typer.Option(help="Whose the following are; * for all that have no rule.")] = None,
    floor: Annotated[
        str | None, typer.Option(help="Others' loads leave the owner so much, as in 64MiB, while there is another way.")
    ] = None,
    ceiling: Annotated[str | None, typer.Option(help="The owner has no more than this; none for no limit.")] = None,
    priority: Annotated[Priority | None, typer.Option(help="Adapters of a lower priority go first.")] = None,
    reset: Annotated[bool, typer.Option("--reset", help="Forget the owner's rule.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Change nothing; say what would leave each tier now.")
    ] = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Change what is given of the rules, at once and for the next start. Needs an admin key."""
    changes: dict[str, Any] = {}
    if policy is not None:
        changes["policy"] = policy
    if ttl is not None:
        changes["ttl_seconds"] = None if ttl == _NONE else parse_duration(ttl)
    rule: dict[str, Any] = {}
    if floor is not None:
        rule["floor_bytes"] = parse_bytes(floor)
    if ceiling is not None:
        rule["ceiling_bytes"] = None if ceiling == _NONE else parse_bytes(ceiling)
    if priority is not None:
        rule["priority"] = _PRIORITIES.index(priority)
    if (bool(rule) or reset) != (owner is not None) or (rule and reset):
        raise BadRequest("--owner goes with --floor, --ceiling or --priority, or else with --reset.")
    if not changes and owner is None:
        raise BadRequest("Give what to change: --policy, --ttl, or --owner with a rule.")
    if owner is not None:
        changes["owners"] = {owner: None if reset else rule}
    body = dict.fromkeys(tier or (Where.DEVICE, Where.RAM), changes)
    answer = Client(url, key).patch("/admin/policy", body, dry_run=dry_run)
    if dry_run:
        _show_plan(answer, as_json)
    else:
        _show_rules(answer, as_json)


app.command()(simulate)


def _show_rules(rules: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(rules)
        return
    columns = {"Tier": "tier", "Policy": "policy", "Unused goes after": "ttl"}
    tiers = [
        {"tier": name, "policy": r["policy"], "ttl": "-" if r["ttl_seconds"] is None else duration(r["ttl_seconds"])}
        for name, r in rules.items()
    ]
    show(tiers, False, columns, right=("Unused goes after",))
    owners = [
        {
            "tier": name,
            "owner": "* (all others)" if owner == "*" else owner,
            "floor": format_bytes(rule["floor_bytes"]),
            "ceiling": "-" if rule["ceiling_bytes"] is None else format_bytes(rule["ceiling_bytes"]),
            "priority": _PRIORITIES[rule["priority"]],
        }
        for name, r in rules.items()
        for owner, rule in r["owners"].items()
    ]
    if owners:
        columns = {"Tier": "tier", "Owner": "owner", "Floor": "floor", "Ceiling": "ceiling", "Priority": "priority"}
        show(owners, False, columns, right=("Floor", "Ceiling"))


def _show_plan(plan: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(plan)
        return
    tiers = ("device", "ram", "disk")
    rows = [
        {"tier": tier, "models": ", ".join(gone["models"]) or "(deleted)", "bytes": format_bytes(gone["bytes"])}
        for tier in tiers
        for gone in plan[tier]
    ]
    if rows:
        show(rows, False, {"Tier": "tier", "Would go": "models", "Size": "bytes"}, right=("Size",))
    freed = [format_bytes(sum(gone["bytes"] for gone in plan[tier])) for tier in tiers]
    device, ram, disk = (f"{len(plan[tier])} ({size})" for tier, size in zip(tiers, freed, strict=True))
    console.print(
        f"Adapters that would leave the device: {device}, RAM: {ram}, and the disk: {disk}. Nothing was changed."
    )
