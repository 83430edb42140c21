"""One answer under way: from the engine's tokens to text, with stop strings, usage, and a client that may go away."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

from fastapi import Request

from adapterhub.api.auth import Principal
from adapterhub.api.echo import Echo
from adapterhub.api.fields import GenerationRequest
from adapterhub.api.hub import Hub
from adapterhub.api.models import Model, choose_model
from adapterhub.api.passage import Passage
from adapterhub.api.stops import StopStrings
from adapterhub.api.tenancy.rates import USUAL_ANSWER, Admission
from adapterhub.api.tenancy.usage import Counts
from adapterhub.base.grammar import Grammar
from adapterhub.base.request import Origin, Sampling, Token
from adapterhub.base.request import Request as EngineRequest
from adapterhub.errors import BlockDamaged
from adapterhub.swap.ref import Tier

Result = TypeVar("Result")


class Said(NamedTuple):
    """A token, and how many characters of its answer came before it."""

    token: Token
    offset: int


@dataclass(frozen=True)
class Piece:
    """More text of answer `index`, and the tokens it came from where their log probabilities were asked for; the last
    one says why it ended: "stop" or "length"."""

    index: int
    text: str
    finish: str | None = None
    tokens: tuple[Said, ...] = ()


class Generation:
    """The answers to one request: one for each prompt and choice, all under way at once.

    Nothing is sent before every one of them has `started`: whatever is wrong with a request shows by its first token.
    Then they are read as they come (`pieces`), or `whole`.
    """

    def __init__(
        self,
        hub: Hub,
        caller: Principal,
        model: Model,
        prompts: list[list[int]],
        request: GenerationRequest,
        plan: Sampling,
        grammar: Grammar | None = None,
        *,
        echoes: list[Echo] | None = None,
        best_of: int | None = None,
    ) -> None:
        """`echoes`: what the answers to each prompt begin with. `best_of`: so many answers are made for each prompt,
        and those told whose tokens were likeliest, for which the plan must ask for log probabilities."""
        self.id = secrets.token_hex(12)
        self.model = model
        self.prompt_tokens = sum(map(len, prompts))
        self._hub, self._caller, self._user, self._stops = hub, caller, request.user, request.stops
        self._prompts, self._plan, self._grammar, self._echoes = prompts, plan, grammar, echoes
        self._told = request.n or 1
        self._each = best_of or self._told
        self.choices = len(prompts) * self._each
        self._likelihoods: list[list[float]] = []  # of each answer's tokens, where they were asked for
        self.origin: Origin | None = None
        self.completion_tokens = 0
        self._cached: dict[int, int] = {}  # tokens of each prompt that the KV cache had before any answer to it
        self._admission: Admission | None = None
        self._left = False  # by a client that did not wait for the first token
        self._answers: list[AsyncGenerator[Piece]] = []
        self._first: list[Piece] = []
        self._next: dict[asyncio.Future[Piece], int] = {}  # what is awaited of which answer

    async def started(self) -> bool:
        """Raises RateLimited, and whatever keeps an answer from its first token."""
        answers = self.choices * min(self._plan.max_tokens, USUAL_ANSWER)
        self._admission = self._hub.rates.admit(self._caller.owner, self.prompt_tokens + answers)
        try:
            for attempt in itertools.count():
                try:
                    await self._start(attempt)
                    break
                except BlockDamaged:
                    version = self.model.version
                    if version is None or self._hub.registry.resolve(version.owner, version.model) is not None:
                        raise
                    # it was deleted while the request waited for it: the name means another one now, or is unknown
                    self.model = choose_model(self._hub, self._caller, self.model.name, self._user)
        except BaseException as error:
            self._left = isinstance(error, asyncio.CancelledError)
            await self.close()
            raise
        return True

    async def _start(self, attempt: int) -> None:
        self.origin, self.completion_tokens, self._cached = None, 0, {}
        self._likelihoods = [[] for _ in range(self.choices)]
        self._answers = [self._answer(index, f"{self.id}-{attempt}-{index}") for index in range(self.choices)]
        try:
            for index in range(len(self._answers)):
                self._await(index)
            self._first = await asyncio.gather(*self._next)
            self._next.clear()
        except BaseException:
            await self._cancel()
            raise

    async def pieces(self) -> AsyncIterator[Piece]:
        """Everything from the first pieces on, of all answers as they come."""
        for piece in self._first:
            yield piece
        for piece in self._first:
            if piece.finish is None:
                self._await(piece.index)
        while self._next:
            done, _ = await asyncio.wait(self._next, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = self._next.pop(task)
                piece = task.result()
                yield piece
                if piece.finish is None:
                    self._await(index)

    async def whole(self) -> list[Piece]:
        """Each answer in one piece, in order; of `best_of` the best."""
        try:
            await self.started()
            parts: list[list[Piece]] = [[] for _ in self._answers]
            async for piece in self.pieces():
                parts[piece.index].append(piece)
        finally:
            await self.close()
        return [
            Piece(i, "".join(p.text for p in part), part[-1].finish, tuple(t for p in part for t in p.tokens))
            for i, part in enumerate(parts[best] for best in self._best())
        ]

    def _best(self) -> Iterator[int]:
        """Which answers are told: for each prompt, those with the highest log probability per token, of equals the
        first."""
        for first in range(0, self.choices, self._each):
            answers: Iterable[int] = range(first, first + self._each)
            if self._each > self._told:
                answers = sorted(answers, key=lambda i: fmean(self._likelihoods[i]), reverse=True)
            yield from itertools.islice(answers, self._told)

    async def close(self) -> None:
        """Stops the engine's work on answers that nobody waits for, and counts what was used: a request from its first
        token on, and so nothing of one that failed before. Of its tokens per minute, one that was left then has used
        its prompt."""
        try:
            await self._cancel()
        finally:
            if self._admission is not None:
                self._count(self._admission)
                self._admission = None

    def _count(self, admission: Admission) -> None:
        used = Counts(1, self.prompt_tokens, self.completion_tokens) if self.origin is not None else Counts()
        left = self.prompt_tokens if self._left else 0
        self._hub.rates.settle(admission, used.input_tokens + used.output_tokens or left)
        if used.requests:
            version, origin = self.model.version, self.origin
            cold = version is not None and origin is not None and origin.tier is not Tier.DEVICE
            adapter = version.name if version else None
            self._hub.meter.note(self._caller.owner, self._caller.key, adapter, used._replace(cold_boots=int(cold)))

    async def _cancel(self) -> None:
        for task in self._next:  # first, since an answer that is awaited cannot be closed
            task.cancel()
        await asyncio.gather(*self._next, return_exceptions=True)
        self._next.clear()
        for answer in self._answers:
            await answer.aclose()

    @property
    def headers(self) -> dict[str, str]:
        version, origin = self.model.version, self.origin
        assert origin is not None
        return {
            "x-adapterhub-version": version.id if version else "base",
            "x-adapterhub-tier": origin.tier,
            "x-adapterhub-load-ms": f"{origin.load_ms:.2f}",
            **self._hub.rates.headers(self._caller.owner),
        }

    @property
    def usage(self) -> dict[str, Any]:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }

    def _await(self, index: int) -> None:
        self._next[asyncio.ensure_future(anext(self._answers[index]))] = index

    async def _answer(self, index: int, identity: str) -> AsyncGenerator[Piece]:
        prompt, plan, version = self._prompts[index // self._each], self._plan, self.model.version
        sampling = replace(plan, seed=None if plan.seed is None else plan.seed + index % self._each)
        adapter = version.ref if version else None
        echo = self._echoes[index // self._each] if self._echoes else Echo("", [])
        text, stopped = self._hub.codec.stream(prompt), StopStrings(self._stops)
        held: list[Said] = []  # a token is told with its text, and not at all where that belongs to a stop string
        request = EngineRequest(identity, prompt, sampling, adapter, self._caller.owner, self._grammar)
        with Passage(self._hub.metrics, self._hub.tracing.tracer, len(prompt)) as passage:
            async with aclosing(self._hub.run(request, self._caller.key)) as outputs:
                async for output in outputs:
                    passage.heard(output)
                    self.origin = self.origin or output.origin
                    if output.token is not None:
                        self.completion_tokens += 1
                        if output.token.logprob is not None:
                            self._likelihoods[index].append(output.token.logprob)
                    says = output.token if output.finish != "stop" else None
                    if says and sampling.logprobs is not None:
                        held.append(Said(says, len(echo.text) + stopped.length))
                    shown = stopped.push(text.push(says.id) if says else "", last=output.last)
                    told = tuple(said for said in held if stopped.shows(said.offset - len(echo.text)))
                    held = held[len(told) :]
                    if output.origin is not None:  # it is the first
                        which, found = index // self._each, output.origin.cached_tokens
                        self._cached[which] = min(found, self._cached.get(which, found))
                        shown = echo.text + shown
                        if sampling.prompt_logprobs is not None:
                            tokens = (Token(prompt[0]), *output.prompt)
                            told = (*map(Said, tokens, echo.starts), *told)
                    finish = "stop" if stopped.hit else output.finish
                    if finish:
                        passage.finished(finish)
                    yield Piece(index, shown, finish, told)
                    if finish:
                        return


async def while_connected(request: Request, work: Awaitable[Result]) -> Result | None:
    """Awaits `work`, which is cancelled when the client goes away; None then."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        for pending in (task, watcher):
            pending.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
