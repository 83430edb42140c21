"""One answer under way: from the engine's tokens to text, with stop strings, usage, and a client that may go away."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple, TypeVar

from fastapi import Request
from pydantic import BaseModel, Field

from adapterhub.api.auth import Principal
from adapterhub.api.body import Body
from adapterhub.api.hub import Hub
from adapterhub.api.models import Model, choose_model
from adapterhub.api.passage import Passage
from adapterhub.api.tenancy.rates import USUAL_ANSWER, Admission
from adapterhub.api.tenancy.usage import Counts
from adapterhub.base.grammar import Grammar
from adapterhub.base.request import Origin, Sampling, Token
from adapterhub.base.request import Request as EngineRequest
from adapterhub.errors import BadRequest, BlockDamaged
from adapterhub.swap.ref import Tier

Result = TypeVar("Result")
MAX_STOPS = 4
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(BaseModel):
    include_usage: bool = False


class GenerationRequest(Body):
    """What chat and plain completions share. `ignore_eos` and `min_tokens` are vLLM's, for load generators."""

    model: str
    user: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | list[Stop] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    ignore_eos: bool = False
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Field(max_length=1024)] | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self, hub: Hub, **unsupported: Any) -> None:
        """Raises BadRequest for what cannot be done. `unsupported`: fields that must not ask for anything."""
        if len(self.stops) > MAX_STOPS:
            raise BadRequest(f"stop: {len(self.stops)} strings; up to {MAX_STOPS} are supported.", param="stop")
        if self.stream_options is not None and not self.stream:
            raise BadRequest("stream_options needs stream=true.", param="stream_options")
        known = hub.codec.vocabulary
        if any(token >= known for token in self.logit_bias or ()):
            raise BadRequest(f"logit_bias names tokens that the base, with {known}, does not have.", param="logit_bias")
        for name, value in unsupported.items():
            if value:
                message = f"{name} is not supported yet. Leave it out."
                raise BadRequest(message, param=name, code="unsupported_parameter")

    def sampling(self, max_tokens: int, logprobs: int | None) -> Sampling:
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias=self.logit_bias or {},
            logprobs=logprobs,
        )


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


class StopStrings:
    """Ends a text before the first of `stops`, and holds back what may still become one."""

    def __init__(self, stops: list[str]) -> None:
        self._stops = stops
        self._held = ""
        self.length = 0  # characters so far, with those that are held back
        self.hit = False

    def push(self, text: str, *, last: bool = False) -> str:
        """What of the text so far can be shown now; all of it when nothing can come after the `last`."""
        self._held += text
        self.length += len(text)
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        self.hit = bool(found)
        keep = 0 if last else max((self._overlap(stop) for stop in self._stops), default=0)
        end = min(found) if found else len(self._held) - keep
        shown, self._held = self._held[:end], self._held[end:]
        return shown

    def shows(self, offset: int) -> bool:
        """Whether what comes after so many characters was shown, or would be if there were any."""
        return not self._held or offset < self.length - len(self._held)

    def _overlap(self, stop: str) -> int:
        """How much of the end of the held text is a beginning of `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


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
    ) -> None:
        self.id = secrets.token_hex(12)
        self.model = model
        self.prompt_tokens = sum(map(len, prompts))
        self._hub, self._caller, self._user, self._stops = hub, caller, request.user, request.stops
        self._prompts, self._plan, self._each, self._grammar = prompts, plan, request.n or 1, grammar
        self.choices = len(prompts) * self._each
        self.origin: Origin | None = None
        self.completion_tokens = 0
        self._admission: Admission | None = None
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
        except BaseException:
            await self.close()
            raise
        return True

    async def _start(self, attempt: int) -> None:
        self.origin, self.completion_tokens = None, 0
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
        """Each answer in one piece, in order."""
        try:
            await self.started()
            parts: list[list[Piece]] = [[] for _ in self._answers]
            async for piece in self.pieces():
                parts[piece.index].append(piece)
        finally:
            await self.close()
        return [
            Piece(i, "".join(p.text for p in part), part[-1].finish, tuple(t for p in part for t in p.tokens))
            for i, part in enumerate(parts)
        ]

    async def close(self) -> None:
        """Stops the engine's work on answers that nobody waits for, and counts what was used: a request from its first
        token on, and so nothing of one that failed before."""
        try:
            await self._cancel()
        finally:
            if self._admission is not None:
                self._count(self._admission)
                self._admission = None

    def _count(self, admission: Admission) -> None:
        used = Counts(1, self.prompt_tokens, self.completion_tokens) if self.completion_tokens else Counts()
        self._hub.rates.settle(admission, used.input_tokens + used.output_tokens)
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
    def usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }

    def _await(self, index: int) -> None:
        self._next[asyncio.ensure_future(anext(self._answers[index]))] = index

    async def _answer(self, index: int, identity: str) -> AsyncGenerator[Piece]:
        prompt, plan, version = self._prompts[index // self._each], self._plan, self.model.version
        sampling = replace(plan, seed=None if plan.seed is None else plan.seed + index % self._each)
        adapter = version.ref if version else None
        text, stopped = self._hub.codec.stream(prompt), StopStrings(self._stops)
        held: list[Said] = []  # a token is told with its text, and not at all where that belongs to a stop string
        request = EngineRequest(identity, prompt, sampling, adapter, self._caller.owner, self._grammar)
        with Passage(self._hub.metrics, self._hub.tracing.tracer, len(prompt)) as passage:
            async with aclosing(self._hub.run(request, self._caller.key)) as outputs:
                async for output in outputs:
                    passage.token(output.origin)
                    self.origin = self.origin or output.origin
                    self.completion_tokens += 1
                    says = output.token if output.finish != "stop" else None
                    if says and sampling.logprobs is not None:
                        held.append(Said(says, stopped.length))
                    shown = stopped.push(text.push(says.id) if says else "", last=output.last)
                    told = tuple(said for said in held if stopped.shows(said.offset))
                    held = held[len(told) :]
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


def longest_answer(hub: Hub, prompt: int, asked: int | None) -> int:
    """`asked`, or all that the context has left. Raises ContextLengthExceeded when that is nothing."""
    hub.engine.check_length(prompt, asked or 1, "messages")
    return asked or hub.engine.context - prompt
