"""What there is beside OpenAI's objects: adapters, accounts, and what an operator sees and steers."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from adapterhub.api.answers.openai import Number, Page
from adapterhub.api.tenancy.keys import State
from adapterhub.api.tenancy.terms import Scope
from adapterhub.swap.versions import Kind

TierName = Literal["device", "ram", "disk", "remote"]


# -- adapters


class Used(TypedDict):
    hits: int
    loads: int
    last_used_at: float | None


class VersionObject(Used):
    id: str
    object: Literal["adapter.version"]
    number: int | None
    model: str
    kind: Kind
    step: int | None
    metrics: dict[str, Any] | None
    current: bool
    percent: int
    origin: str
    bytes: int
    rank: int
    base: str
    digest: str
    tier: TierName
    created_at: int


class AdapterObject(Used):
    id: str
    object: Literal["adapter"]
    name: str
    owner: str
    model: str
    base: str
    current: str | None
    bytes: int | None
    rank: int | None
    tier: TierName | None
    split: dict[str, int] | None
    pinned: Literal["owner", "admin"] | None
    created_at: int
    versions: list[VersionObject]


class ImportedAdapter(AdapterObject):
    warnings: list[str]


class Adapters(Page[AdapterObject]):
    total: int


class Was(TypedDict):
    version: str
    since: int


class Versions(Page[VersionObject]):
    history: list[Was]


class Evicted(TypedDict):
    id: str
    object: Literal["adapter"]
    evicted: bool
    in_use: int


# -- accounts


class KeyObject(TypedDict):
    id: str
    object: Literal["key"]
    owner: str
    project: str
    scopes: list[Scope]
    hint: str
    state: State
    created_at: int
    expires_at: int | None
    revoked_at: int | None
    last_used_at: int | None


class NewKey(KeyObject):
    key: str


class Limits(TypedDict):
    adapters: int | None
    bytes: int | None
    jobs: int | None
    requests_per_minute: int | None
    tokens_per_minute: int | None


class Kept(TypedDict):
    adapters: int
    bytes: int
    jobs: int


class QuotaObject(TypedDict):
    """`used` is not told of `*`."""

    object: Literal["quota"]
    owner: str
    limits: Limits
    used: NotRequired[Kept]


class OwnersQuota(QuotaObject):
    set: dict[str, int | None]


class Quotas(QuotaObject):
    set: dict[str, dict[str, int | None]]


class UsageObject(TypedDict):
    """With what it was asked to be grouped by."""

    id: str
    object: Literal["usage"]
    day: NotRequired[str]
    owner: NotRequired[str]
    project: NotRequired[str | None]
    key: NotRequired[str | None]
    adapter: NotRequired[str | None]
    requests: int
    input_tokens: int
    output_tokens: int
    training_tokens: int
    cold_boots: int
    byte_hours: float


class Left(TypedDict):
    store: str
    blocks: int


class ErasureObject(TypedDict):
    id: str
    object: Literal["user.erasure"]
    status: Literal["in_progress", "completed"]
    removed: dict[str, int]
    left_in_stores: list[Left]
    begun_at: int
    finished_at: int | None


class Erased(ErasureObject):
    owner: str


# -- operations


class BaseObject(TypedDict):
    name: str
    fingerprint: str
    bytes: int
    device: str


class Tiers(TypedDict):
    base: BaseObject
    tiers: dict[Literal["device", "ram", "disk", "store"], dict[str, Any]]
    engine: dict[str, Any]
    devices: list[dict[str, Any]]
    trace: dict[str, int | bool]


class OwnerRules(TypedDict):
    floor_bytes: int
    ceiling_bytes: int | None
    priority: int


class TierRules(TypedDict):
    policy: str
    ttl_seconds: Number | None
    owners: dict[str, OwnerRules]


class Rules(TypedDict):
    device: TierRules
    ram: TierRules
    disk: TierRules


class Leaving(TypedDict):
    digest: str
    bytes: int
    models: list[str]


class DryRun(TypedDict):
    """What would leave each tier."""

    rules: Rules
    device: list[Leaving]
    ram: list[Leaving]
    disk: list[Leaving]
