"""What passes between the API and the engine: plain data, so that an engine could live in another process."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from adapterhub.errors import HubError
from adapterhub.swap.tiers import AdapterRef, Tier


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy; `top_p` keeps the smallest set of tokens of that mass."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0  # no end of text before that many
    ignore_eos: bool = False


@dataclass(frozen=True)
class Request:
    """One sequence to continue. `adapter` None asks for the base itself."""

    id: str
    prompt: list[int]
    sampling: Sampling = field(default_factory=Sampling)
    adapter: AdapterRef | None = None


class Finish(StrEnum):
    STOP = "stop"  # an end-of-text token
    LENGTH = "length"  # max_tokens, or the end of the context


@dataclass(frozen=True)
class Origin:
    """Where a request's adapter was found, and how long it took to bring it to the device."""

    tier: Tier
    load_ms: float


@dataclass(frozen=True)
class Output:
    """News of one request: a token, its end, or its failure. `origin` comes with the first token."""

    request: str
    token: int | None = None
    finish: Finish | None = None
    error: HubError | None = None
    origin: Origin | None = None

    @property
    def last(self) -> bool:
        return self.finish is not None or self.error is not None
