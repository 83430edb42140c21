"""What an operator sets for the tiers, as JSON says it: the policy, how long what is unused stays, and what each owner
may take. Frozen; checked when read."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from adapterhub.errors import BadRequest
from adapterhub.swap.policies.orders import Policy

EVERYBODY = "*"  # in `owners`: who is not named
PRIORITIES = (0, 1, 2)  # low, normal, high
_TIERS = ("device", "ram", "disk")
_OWNER_FIELDS = ("floor_bytes", "ceiling_bytes", "priority")


@dataclass(frozen=True)
class OwnerRule:
    """Others' loads do not push an owner below the floor while there is another way; what is over the ceiling goes
    first, and a load that would go over it takes the owner's own place. Lower priorities go before higher ones."""

    floor_bytes: int = 0
    ceiling_bytes: int | None = None
    priority: int = 1

    @classmethod
    def parse(cls, data: Any, at: str) -> OwnerRule:
        fields = _fields(data, at, _OWNER_FIELDS)
        rule = cls(**fields)
        _check_bytes(rule.floor_bytes, f"{at}.floor_bytes")
        if rule.ceiling_bytes is not None:
            _check_bytes(rule.ceiling_bytes, f"{at}.ceiling_bytes")
            if rule.ceiling_bytes < rule.floor_bytes:
                raise BadRequest(
                    f"The ceiling of {rule.ceiling_bytes} bytes is below the floor of {rule.floor_bytes}. Raise it, or "
                    "leave it out for none.",
                    param=f"{at}.ceiling_bytes",
                )
        if type(rule.priority) is not int or rule.priority not in PRIORITIES:
            raise BadRequest(f"A priority is 0, 1 or 2, not {rule.priority!r}.", param=f"{at}.priority")
        return rule


_NO_RULE = OwnerRule()


@dataclass(frozen=True)
class TierRules:
    """`ttl_seconds`: what was not used for so long goes, even when there is room. Pins outweigh every rule."""

    policy: Policy = Policy.LRU
    ttl_seconds: float | None = None
    owners: Mapping[str, OwnerRule] = field(default_factory=dict)

    def of(self, owner: str) -> OwnerRule:
        return self.owners.get(owner) or self.owners.get(EVERYBODY, _NO_RULE)

    def merged(self, data: Any, at: str) -> TierRules:
        """These rules with the fields of `data` in their place. Raises BadRequest."""
        fields = dict(_fields(data, at, ("policy", "ttl_seconds", "owners")))
        if "policy" in fields:
            if fields["policy"] not in list(Policy):
                known = ", ".join(Policy)
                raise BadRequest(f"There is no policy {fields['policy']!r}; there are {known}.", param=f"{at}.policy")
            fields["policy"] = Policy(fields["policy"])
        ttl = fields.get("ttl_seconds")
        if ttl is not None and (type(ttl) not in (int, float) or not 0 < ttl < float("inf")):
            raise BadRequest(f"{ttl!r} is not a number of seconds above 0.", param=f"{at}.ttl_seconds")
        if "owners" in fields:
            owners = fields["owners"]
            if not isinstance(owners, dict):
                raise BadRequest("Write an object with a rule for each owner.", param=f"{at}.owners")
            fields["owners"] = {name: OwnerRule.parse(rule, f"{at}.owners.{name}") for name, rule in owners.items()}
        return dataclasses.replace(self, **fields)

    def patched(self, data: Any, at: str) -> TierRules:
        """`merged`, but of `owners` only the rules and their fields that are given change; null forgets an owner's."""
        fields = dict(_fields(data, at, ("policy", "ttl_seconds", "owners")))
        if isinstance(fields.get("owners"), dict):
            owners = {name: dataclasses.asdict(rule) for name, rule in self.owners.items()}
            for name, rule in fields["owners"].items():
                if rule is None:
                    owners.pop(name, None)
                else:
                    owners[name] = owners.get(name, {}) | _fields(rule, f"{at}.owners.{name}", _OWNER_FIELDS)
            fields["owners"] = owners
        return self.merged(fields, at)


@dataclass(frozen=True)
class Rules:
    device: TierRules = TierRules()
    ram: TierRules = TierRules()
    disk: TierRules = TierRules()  # where the disk is a cache of a store; else nothing leaves it

    def merged(self, data: Any) -> Rules:
        """These rules with what `data` has, some tiers and some of their fields, in their place. Raises BadRequest."""
        tiers = _fields(data, "rules", _TIERS)
        return dataclasses.replace(self, **{name: getattr(self, name).merged(tiers[name], name) for name in tiers})

    def patched(self, data: Any) -> Rules:
        """`merged`, but owners that `data` does not name keep their rules. Raises BadRequest."""
        tiers = _fields(data, "rules", _TIERS)
        return dataclasses.replace(self, **{name: getattr(self, name).patched(tiers[name], name) for name in tiers})

    @property
    def json(self) -> dict[str, Any]:
        """What `merged` reads."""
        return dataclasses.asdict(self)


def _fields(data: Any, at: str, known: Collection[str]) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise BadRequest(f"{at} must be an object with some of {', '.join(known)}.", param=at)
    for name in data:
        if name not in known:
            raise BadRequest(f"{at} has no field {str(name)[:80]!r}; there are {', '.join(known)}.", param=at)
    return data


def _check_bytes(value: Any, at: str) -> None:
    if type(value) is not int or value < 0:
        raise BadRequest(f"{value!r} is not a number of bytes.", param=at)
