"""What passes between the API and the engine: plain data, so that an engine could live in another process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from adapterhub.base.grammar import Grammar
from adapterhub.errors import HubError
from adapterhub.swap.ref import AdapterRef, Tier


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy; `top_p` keeps the smallest set of tokens of that mass.

    The penalties are taken off the logits of tokens that were produced: `frequency_penalty` for each time,
    `presence_penalty` once. `logprobs` asks for each token's log probability, and those of that many best ones,
    `prompt_logprobs` for the same of the prompt's tokens. With `max_tokens` 0 the prompt is computed and no more.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0  # no end of text before that many
    ignore_eos: bool = False
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True)
class Request:
    """One sequence to continue; no two under way have one `id`. `adapter` None asks for the base itself."""

    id: str
    prompt: list[int]
    sampling: Sampling = field(default_factory=Sampling)
    adapter: AdapterRef | None = None
    owner: str = ""  # between whom the engine is fair, and across whom nothing is shared
    grammar: Grammar | None = None  # that the answer follows


class Finish(StrEnum):
    STOP = "stop"  # an end-of-text token
    LENGTH = "length"  # max_tokens, or the end of the context


@dataclass(frozen=True)
class Origin:
    """Where a request's adapter was found, how long it took to bring it to the device, how long the request was in the
    queue before its first step, and how many tokens of its prompt were in the KV cache by then."""

    tier: Tier
    load_ms: float
    queued_ms: float
    cached_tokens: int


class Logprob(NamedTuple):
    token: int
    logprob: float


@dataclass(frozen=True)
class Token:
    """A token of an answer or a prompt. Log probabilities are the model's, before temperature, penalties and bias."""

    id: int
    logprob: float | None = None
    best: tuple[Logprob, ...] = ()


@dataclass(frozen=True)
class Output:
    """News of one request: a token, its end, or its failure.

    With the first comes `origin`, and `prompt`, where that was asked for: the prompt's tokens from the second on, as
    nothing is said of how likely the first is.
    """

    request: str
    token: Token | None = None
    finish: Finish | None = None
    error: HubError | None = None
    origin: Origin | None = None
    prompt: tuple[Token, ...] = ()

    @property
    def last(self) -> bool:
        return self.finish is not None or self.error is not None
